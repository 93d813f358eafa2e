"""Trains the tokenizer that a configuration asks for."""

from collections.abc import Iterable

from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer
from jaxllm.tokenizers.trainers import SMALLEST_VOCABULARY, TRAINERS


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer of `config.kind` on `texts`; the same texts give the same tokenizer.

    Raises:
        UserError: the vocabulary asked for is smaller than the kind's fixed part (special tokens
            and bytes), or larger than the texts can give.
    """
    smallest = SMALLEST_VOCABULARY[config.kind]
    if config.vocab_size < smallest:
        raise UserError(
            f"config.tokenizer.vocab_size: is {config.vocab_size}, but special tokens and bytes "
            f"alone make {smallest}; raise it to {smallest} or more."
        )
    tokenizer = TRAINERS[config.kind](texts, config.vocab_size)
    if tokenizer.vocab_size < config.vocab_size:
        raise UserError(
            f"config.tokenizer.vocab_size: is {config.vocab_size}, but the training text gives "
            f"only {tokenizer.vocab_size} tokens; lower it to {tokenizer.vocab_size} or less, "
            "or give more text."
        )
    return tokenizer
