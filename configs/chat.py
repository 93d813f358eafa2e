"""A conversation with a trained model in the terminal.

    python -m jaxllm.main --config=configs/chat.py --config.init=runs/first
    python -m jaxllm.main --config=configs/chat.py --config.init=runs/first \
        --config.prompt="What is a list?" --config.temperature=0

The second line prints one answer and ends. A model answers well only if it was trained to; one
that was only pretrained goes on with the text. Seconds to the first answer on a laptop.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.chat import ChatConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(ChatConfig())
