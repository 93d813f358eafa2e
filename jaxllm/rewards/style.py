"""Rewards of how a response is written, whatever it says: pattern, thinking, length, repetition."""

import dataclasses
import re

from jaxllm.data.words import WORD, WORD_OR_MARK
from jaxllm.rewards.final_answer import THINK, THINK_END, final_answer, thinks_from_the_start
from jaxllm.rewards.reward import OneByOne, Record

UNITS = ("words", "characters")
"""What a text is counted in. Of Chinese and Japanese each character is a word, see `data.words`."""


@dataclasses.dataclass(frozen=True)
class Regex(OneByOne):
    """1 if the response holds a match of a regular expression of Python; else 0.

    Nothing bounds the time that a pattern takes: one such as `(a+)+$` takes for ever on some
    responses of a few dozen signs. It is the configuration's, and so the user's own. `limit`
    bounds what patterns cost that take the square of a text's length.
    """

    pattern: str
    full: bool = False
    """Whether it has to match the whole response, white space at its ends left out."""
    limit: int = 20_000
    """Characters; a longer response gets 0 unread."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError("limit: must be 1 or more")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: is no regular expression ({error})") from None

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        if len(response) > self.limit:
            return 0.0
        find = re.fullmatch if self.full else re.search
        return float(find(self.pattern, response.strip()) is not None)


@dataclasses.dataclass(frozen=True)
class Format(OneByOne):
    """1 if the response is `<think>…</think>` and then an answer, neither of them blank; else 0.

    Each mark stands once, and nothing but white space before the first, which may be the end of
    the prompt instead.
    """

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        text = (THINK if thinks_from_the_start(prompt) else "") + response.strip()
        thought, ended, _ = text.removeprefix(THINK).partition(THINK_END)
        right = (
            text.startswith(THINK)
            and text.count(THINK) == text.count(THINK_END) == 1
            and bool(ended and thought.strip() and final_answer(prompt, response))
        )
        return float(right)


@dataclasses.dataclass(frozen=True)
class Length(OneByOne):
    """0 up to a limit, from there falling linearly, to −1 at `limit + scale` and beyond:

        −min(1, max(0, n − limit) / scale)

    with n the length. (Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 13, in tokens.)
    """

    limit: int
    scale: int = 0
    """0: as much as `limit`."""
    unit: str = "characters"
    """`characters`, of which white space is some, or `words`."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError("limit: must be 1 or more")
        if self.scale < 0:
            raise ValueError("scale: must be 0 (as much as limit) or more")
        _check_unit(self.unit)

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        words = self.unit == "words"
        length = sum(1 for _ in WORD.finditer(response)) if words else len(response)
        beyond = max(0, length - self.limit)
        return -min(1.0, beyond / (self.scale or self.limit)) if beyond else 0.0


@dataclasses.dataclass(frozen=True)
class Repetition(OneByOne):
    """Minus the share of n-grams that stand in the response before, in 0 to −1:

        −(1 − distinct n-grams / all n-grams)

    Words are compared without regard to case, and any other sign but white space is one too. A
    response of fewer than n words gets 0. (Yeo et al. 2025, https://arxiv.org/abs/2502.03373,
    penalise repeated n-grams too, token by token.)
    """

    n: int = 3
    unit: str = "words"
    """`words`, or `characters` but white space: they see what repeats within one long word."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("n: must be 1 or more")
        _check_unit(self.unit)

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        text = response.casefold()
        parts = WORD_OR_MARK.findall(text) if self.unit == "words" else "".join(text.split())
        count = len(parts) - self.n + 1
        if count < 1:
            return 0.0
        distinct = len(set(zip(*(parts[start:] for start in range(self.n)), strict=False)))
        return distinct / count - 1.0


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit: {unit!r} is unknown; there are {', '.join(UNITS)}")
