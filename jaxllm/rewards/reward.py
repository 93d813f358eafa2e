"""What a reward function is, and what those that judge each response alone share."""

import abc
import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.errors import UserError

Record = Mapping[str, Any]
"""The fields of the record that a prompt comes from."""

RewardFunction = Callable[
    [Sequence[str], Sequence[str], Sequence[Record]], Sequence[float] | np.ndarray
]
"""Takes prompts, responses and records, one of each for every response; gives a number for each."""


@dataclasses.dataclass(frozen=True)
class OneByOne(abc.ABC):
    """A reward function that judges each response alone.

    The fields of a subclass are its options: `int`, `float`, `bool` or `str`. Its `__post_init__`
    may raise `ValueError("option: what is wrong")`.
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], records: Sequence[Record]
    ) -> list[float]:
        """See `RewardFunction`.

        Raises:
            UserError: a record cannot be judged by; the message says why, and not which it is.
        """
        return [self.score(*each) for each in zip(prompts, responses, records, strict=True)]

    @abc.abstractmethod
    def score(self, prompt: str, response: str, record: Record) -> float:
        """What one response is worth.

        Raises:
            UserError: as `__call__`.
        """


def field(record: Record, name: str) -> Any:
    """A field that a record must have.

    Raises:
        UserError: it has none, or null.
    """
    value = record.get(name)
    if value is None:
        raise UserError(
            f"it has no `{name}` (it has {', '.join(map(str, record)) or 'no field'}); give it one."
        )
    return value


def answer_text(record: Record) -> str:
    """The field `answer`, a text or a number, as a text.

    Raises:
        UserError: there is none, it is of another type, or blank.
    """
    value = field(record, "answer")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"its `answer` is {type(value).__name__}; give a text or a number.")
    if not value.strip():
        raise UserError("its `answer` is empty, and so would be right; give it one.")
    return value
