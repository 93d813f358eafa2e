"""Lets a teacher answer prompts, for a student to learn from (black-box distillation).

    python -m jaxllm.main --config=configs/generate_data.py --workdir=runs/answers \
        --config.teacher.init=runs/reason/reasoner --config.data.train=builtin:last_digit:1k-1400 \
        --config.samples=4 --config.rewards=numeric --config.least=1
    python -m jaxllm.main --config=configs/sft.py --workdir=runs/student \
        --config.init=runs/reason/base --config.data.train=runs/answers/data.jsonl

The first asks a model as configs/reason.py makes it, four times each of 400 tasks, and keeps what
is right. On 2 CPU cores, beside other work, that took 20 seconds: of 1,600 responses 1,146 were
given before, 163 were wrong, and 291 are kept. The second trains a student on them. A teacher
behind a URL is asked so (docs/generate_data.md), at the pace of its server:

    --config.teacher.url=http://localhost:8000/v1 --config.teacher.model=NAME
    --config.teacher.key_variable=OPENAI_API_KEY       the variable that holds the key, if any

Killed at any moment, the same command goes on, and asks nothing twice that was answered.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.generate_data import GenerateDataConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default but for longer answers."""
    config = config_dict(GenerateDataConfig())
    config.max_new_tokens = 512
    return config
