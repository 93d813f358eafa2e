"""Trains a model on its own responses to prompts, by what they are worth (GRPO).

    python -m jaxllm.main --config=configs/grpo.py --workdir=runs/grpo --config.init=runs/sft

`init` is a run of configs/sft.py.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.grpo import GrpoConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(GrpoConfig(rewards="exact_match"))
    config.steps = 200
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every = 50
    config.eval.every = 50
    config.max_new_tokens = 64
    return config
