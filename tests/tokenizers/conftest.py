"""A tokenizer of each kind, trained once on a few kilobytes."""

import functools
from pathlib import Path

import pytest

from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer


@pytest.fixture(scope="session")
def texts():
    """A licence in English, a line of Chinese and a function."""
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    function = "def jump(fox):\n\tif fox:\n        return fox.over()\n"
    return [licence, "床前明月光，疑是地上霜。\n", function]


@pytest.fixture(scope="session")
def trained(texts):
    """Makes the tokenizer of a kind with 420 tokens (`bytes`: 273)."""
    return functools.cache(lambda kind: train_tokenizer(TokenizerConfig(kind, 420), texts))
