"""Trains a model to reason toward answers that can be checked: a recipe of three runs.

    python -m jaxllm.main --config=configs/reason.py --workdir=runs/reason

1. `base` reads worked chains of calculations (`builtin:chain`).
2. `traces` learns to think first, `<think>…</think>`, and then to answer: what a teacher has
   written and what is right (black-box distillation). With traces of your own, records of
   `question`, `reasoning` and `answer`: --config.traces.data.train=mine.jsonl
3. `reasoner` learns from its own answers by whether they are right (GRPO).

Each has its run directory below the work directory, is left alone once it is finished, and goes on
where it was cut off. Any field of a part can be given, as in --config.reasoner.steps=100.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.grpo import GrpoConfig
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.stages.sft import SftConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = ConfigDict({"stage": "recipe", "order": "base,traces,reasoner"})
    config.base = base()
    config.traces = traces()
    config.reasoner = reasoner()
    return config.lock()


def base() -> ConfigDict:
    """A small model that has seen such calculations."""
    config = config_dict(PretrainConfig())
    config.data.train = "builtin:chain:20k"
    config.data.cleaning.near_duplicates = 0.0
    config.data.seq_len = 192
    config.tokenizer.kind = "bytes"
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.batch_size = 32
    config.steps = 1000
    config.optimizer.learning_rate = 2e-3
    config.references = False
    return config


def traces() -> ConfigDict:
    """Thinks before it answers."""
    config = config_dict(SftConfig())
    config.init = "base"
    config.data.train = "builtin:chain:20k-24k"
    config.data.seq_len = 192
    config.sft.reasoning = "think"
    config.batch_size = 32
    config.steps = 200
    config.max_new_tokens = 96
    return config


def reasoner() -> ConfigDict:
    """Is right more often."""
    config = config_dict(GrpoConfig())
    config.init = "traces"
    config.data.train = "builtin:chain:24k-40k"
    config.data.eval = "builtin:chain:40k-40200"
    config.rewards = "numeric:1,format:0.1"
    config.rl.max_prompt = 128
    config.rl.eval_temperature = 1.0
    config.rl.eval_samples = 8
    config.batch_size = 128
    config.steps = 200
    config.max_new_tokens = 96
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every = 50
    config.eval.every = 50
    return config
