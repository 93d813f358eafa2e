"""Continues a prompt with a trained model.

    python -m jaxllm.main --config=configs/generate.py --config.init=runs/first \
        --config.prompt="def " --config.temperature=0.8

Seconds on a laptop. `--config.temperature=0` is greedy.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.generate import GenerateConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(GenerateConfig())
