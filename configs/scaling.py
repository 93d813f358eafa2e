"""Fits scaling laws to runs, and says what they make of a budget.

    python -m jaxllm.main --config=configs/scaling.py --workdir=runs/laws \
        --config.data.train=runs.csv --config.scaling.budgets=5.76e23
    python -m jaxllm.main --config=configs/scaling.py --workdir=runs/laws \
        --config.data.train='runs/mine/*'
    python -m jaxllm.main --config=configs/scaling.py:sweep --workdir=runs/sweep

The first reads a table with columns for N, D (or C) and loss, the second runs of `pretrain`; both
take a minute or two. The third trains the runs itself: models of 60 thousand to 5 million
parameters, with budgets of 1e12 to 8e12 FLOPs, on at most 4 epochs of `builtin:pydocs`, two at a
time; what is done is not done again, and what was cut off goes on (docs/scaling.md).
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.errors import UserError
from jaxllm.stages.scaling import ScalingConfig


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset; the empty one fits what there is."""
    config = config_dict(ScalingConfig())
    if preset == "sweep":
        sweep(config)
    elif preset:
        raise UserError(f"configs/scaling.py has no preset {preset!r}; it has :sweep.")
    return config


def sweep(config: ConfigDict) -> None:
    """Small runs on the documentation of Python, the largest held out and predicted."""
    config.sweep.sizes = "2x32,2x48,3x64,4x96,5x128,6x192,6x256"
    config.sweep.budgets = "1e12,2e12,4e12,8e12"
    config.sweep.min_updates = 100
    config.sweep.at_once = 2
    config.scaling.held_out = 1
    runs = config.pretrain
    runs.tokenizer.vocab_size = 1024
    runs.batch_size = 4
    runs.optimizer.name = "muon"
    runs.optimizer.learning_rate = 0.01
    runs.optimizer.schedule = "linear"
    runs.optimizer.warmup_steps = 20
    runs.optimizer.final_fraction = 0.0
    # Of the curves; all of the text would take longer than the training.
    runs.eval.max_batches = 16
    runs.checkpoint.every = 1000
    runs.references = False
