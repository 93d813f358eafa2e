"""Trains a model to answer, on instructions and conversations (supervised fine-tuning).

    python -m jaxllm.main --config=configs/sft.py --workdir=runs/sft --config.init=runs/first

The default teaches the model of configs/pretrain.py to answer questions about the Python standard
library, from `builtin:pydocs_instruct`; nothing is downloaded. On 2 CPU cores it takes a minute,
and brings the loss of held-out answers to about 3.96 nats a token: a model of a million parameters
learns how an answer looks, and knows little to say. With conversations of your own:

    --config.data.train='mine.jsonl@0.9,builtin:pydocs@0.1'    the second source is only text
    --config.sft.layout=chat                                   by a chat template
    --config.preview=8                                         what the model would see
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.sft import SftConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(SftConfig())
    config.steps = 300
    config.batch_size = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.checkpoint.every = 100
    config.eval.every = 100
    config.max_new_tokens = 96
    return config
