"""Trains a small model to predict as a larger one does (white-box distillation).

    python -m jaxllm.main --config=configs/distill.py --workdir=runs/student \
        --config.teacher.init=runs/first
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.distill import DistillConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(DistillConfig())
    config.steps = 600
    config.batch_size = 8
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 2
    config.temperature = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.final_fraction = 0.1
    config.checkpoint.every = 200
    config.eval.every = 200
    return config
