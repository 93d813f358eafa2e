"""Trains a model to tell which responses are preferred.

    python -m jaxllm.main --config=configs/reward.py --workdir=runs/reward --config.init=runs/sft

The default prefers the docstring of a Python function or class to that of another one, and to one
that is cut or repeats itself (`builtin:pydocs_preference`); nothing is downloaded. `init` is a run
of configs/sft.py. On 2 CPU cores, beside other work, it took four minutes, and told 69 % of
held-out pairs rightly, as many as a rule that never reads the prompt. With preferences of your own,
records of `prompt`, `chosen` and `rejected`, or `responses`, best first:

    --config.data.train=mine.jsonl
    --config.lora.rank=8                           only low-rank pairs, and the head
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.reward import RewardConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(RewardConfig())
    config.steps = 300
    config.batch_size = 8
    config.data.seq_len = 512
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.checkpoint.every = 100
    config.eval.every = 100
    return config
