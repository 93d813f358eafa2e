"""Trains a model on its own responses to prompts, by what they are worth beside each other (GRPO).

    python -m jaxllm.main --config=configs/grpo.py --workdir=runs/grpo --config.init=runs/sft

`init` is a run of configs/sft.py. The default asks it about the Python standard library
(`builtin:pydocs_preference`; nothing is downloaded), and rewards answers that do not repeat
themselves, which those of a small model do.
On 2 CPU cores, beside other work, 50 updates take two minutes, and of them the first 20 raise the
mean reward from -0.33 to 0.00: answers of 30 tokens become ones of 12, which have no room to repeat
anything. That is what was asked for, and a first lesson on rewards.
With tasks whose answers can be checked, see configs/reason.py, and:

    --config.data.train=mine.jsonl --config.rewards=numeric
    --config.grpo.kl_loss=0.04                     held to the reference
    --config.lora.rank=8                           only low-rank pairs
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.grpo import GrpoConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(GrpoConfig(rewards="repetition"))
    config.data.train = "builtin:pydocs_preference"
    config.steps = 50
    config.batch_size = 64
    config.max_new_tokens = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every = 25
    config.eval.every = 25
    return config
