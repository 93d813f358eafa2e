"""Trains a model on its own responses to prompts, by what a reward model says of them (PPO).

    python -m jaxllm.main --config=configs/ppo.py --workdir=runs/ppo --config.init=runs/sft \\
        --config.reward.init=runs/reward

`init` is a run of configs/sft.py, and `reward.init` one of configs/reward.py, whose questions about
the Python standard library are asked (`builtin:pydocs_preference`); nothing is downloaded.
On 2 CPU cores, beside other work, it took twelve minutes, and raised the mean reward of what it
writes from -0.19 to 0.12 (0: as good as the docstrings that the reward model was shown) while it
moved 2.3 nats an answer away from `init`: a model of a million parameters knows as little as before
and says it in the form that is preferred.
With prompts of your own, or answers that can be checked:

    --config.data.train=mine.jsonl
    --config.rewards=numeric                       the value function begins as `init` then
    --config.rl.kl_target=6                        a coefficient that follows the divergence
    --config.lora.rank=8                           only low-rank pairs
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.ppo import PpoConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(PpoConfig())
    config.data.train = "builtin:pydocs_preference"
    config.steps = 200
    config.batch_size = 64
    config.max_new_tokens = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every = 50
    config.eval.every = 50
    return config
