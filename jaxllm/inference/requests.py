"""What is asked of a model that writes, and what it gives."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends, its end-of-document token aside."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities sum to this; 1: all."""
    min_p: float = 0.0
    """Choose among tokens at least this times as probable as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the text already are divided by it where positive, multiplied
    where negative; 1: none."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings in it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens: must be at least 1")
        for name in ("temperature", "top_k"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be a number, and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p: must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError("min_p: must be in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError("repetition_penalty: must be positive; 1 is none")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError("stop: is a tuple of strings, none of them empty")


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue."""

    prompt: tuple[int, ...]
    """Token ids, the one that opens a document included."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Of the draws, modulo 2³²: the same request gives the same text whatever else is asked for
    beside it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the one that ends a document."""
    adapter: str = ""
    """Which of the engine's adapters writes; empty: none, but the model itself."""
    pause: str = ""
    """A regular expression: the text stops where its last signs match it whole, so that someone
    else may go on; empty: nowhere."""


def seed_of(seed: int, number: int) -> int:
    """The seed of one request among several that are made from one seed."""
    return int(np.random.SeedSequence((seed % 2**64, number)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text that was written."""

    ids: tuple[int, ...]
    """The new tokens; one that ended the text is the last."""
    log_probs: tuple[float, ...]
    """Of each new token under the model itself, of all tokens: at temperature 1, or at that of the
    draw (`Engine`'s `tempered`)."""
    text: str
    """The new tokens decoded, up to the first stop string."""
    finish: str
    """`stop`: by a token or string that ends it; `length`: by `max_new_tokens` or the context;
    `pause`: by what the request says of pauses."""
