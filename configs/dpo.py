"""Trains a model to answer as is preferred, from pairs of responses (DPO).

    python -m jaxllm.main --config=configs/dpo.py --workdir=runs/dpo --config.init=runs/sft

`init` is a run of configs/sft.py, and the reference that the policy is held to. The default prefers
the docstring of a Python function or class to that of another one, and to one that is cut or
repeats itself (`builtin:pydocs_preference`); nothing is downloaded. On 2 CPU cores, beside other
work, it took four minutes, and raised the better response further than the worse one in 65 % of
held-out pairs. With records of your own of `prompt`, `chosen` and `rejected`, or `responses`, best
first:

    --config.data.train=mine.jsonl
    --config.dpo.loss=ipo                          or hinge, orpo; simpo with --config.dpo.beta=2
    --config.dpo.loss=kto                          from `response` and `label`, good or bad, too
    --config.lora.rank=8                           only low-rank pairs
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.dpo import DpoConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(DpoConfig())
    config.steps = 200
    config.batch_size = 8
    config.data.seq_len = 512
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every = 100
    config.eval.every = 100
    config.max_new_tokens = 64
    return config
