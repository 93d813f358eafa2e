"""Trains the tokenizer that a configuration asks for."""

import sys
from collections.abc import Iterable

from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.interface import Tokenizer
from jaxllm.tokenizers.sizes import NoTextError, TooLargeError, TooSmallError
from jaxllm.tokenizers.trainers import COUNTING_CHARACTERS, LOSSLESS, SMALLEST_VOCABULARY, TRAINERS

_FIELD = "config.tokenizer.vocab_size"


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer of `config.kind` on `texts`; the same texts give the same tokenizer.

    It has exactly `config.vocab_size` tokens, except that `bytes` has its fixed number, which is
    told on standard error where it is another.

    Raises:
        UserError: the vocabulary asked for is smaller than the kind's fixed part (special tokens,
            bytes, characters), or larger than the texts can give: the message has the nearest
            size that works; or there is too little text for any.
    """
    kind, asked = config.kind, config.vocab_size
    smallest = SMALLEST_VOCABULARY[kind]
    if kind == "bytes":
        if asked != smallest:
            print(f"{_FIELD}: is {asked}, but bytes have {smallest} tokens", file=sys.stderr)
        return TRAINERS[kind](texts, smallest)
    if asked < smallest and kind not in COUNTING_CHARACTERS:
        parts = "bytes" if kind in LOSSLESS else "the smallest alphabet"
        raise UserError(
            f"{_FIELD}: is {asked}, but special tokens and {parts} "
            f"alone make {smallest}; raise it to {smallest} or more."
        )
    try:
        tokenizer = TRAINERS[kind](texts, max(asked, smallest))
        if tokenizer.vocab_size > asked:
            raise TooSmallError(tokenizer.vocab_size)
        if tokenizer.vocab_size < asked:
            raise TooLargeError(tokenizer.vocab_size)
    except TooLargeError as error:
        if error.possible < smallest:
            raise UserError(
                f"config.tokenizer: the training text is too little for {kind}: it gives "
                f"{error.possible} tokens, and {smallest} are the fewest; give more text."
            ) from None
        raise UserError(
            f"{_FIELD}: is {asked}, but the training text gives only {error.possible} tokens; "
            f"lower it to {error.possible} or less, or give more text."
        ) from None
    except TooSmallError as error:
        raise UserError(
            f"{_FIELD}: is {asked}, but special tokens, bytes and the characters of the training "
            f"text alone make {error.possible}; raise it to {error.possible} or more."
        ) from None
    except NoTextError:
        raise UserError("config.tokenizer: there is no text to train on.") from None
    return tokenizer
