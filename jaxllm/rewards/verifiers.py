"""Rewards of 1 for the answer of the record and 0 for any other: as text, as a number."""

import dataclasses
from fractions import Fraction

from jaxllm.errors import UserError
from jaxllm.rewards.exact_numbers import exact, marked, number_in
from jaxllm.rewards.final_answer import boxed, final_answer
from jaxllm.rewards.reward import OneByOne, Record, answer_text, field

_MARK = "####"
_SHOWN = 60  # characters of a value, in messages


@dataclasses.dataclass(frozen=True)
class ExactMatch(OneByOne):
    """1 if the final answer is the record's `answer`, white space made plain; else 0."""

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        target = answer_text(record).split()
        return float(final_answer(prompt, response).split() == target)


@dataclasses.dataclass(frozen=True)
class Numeric(OneByOne):
    """1 if the response gives the number that the record's `answer` is; else 0.

    Of the final answer that is the number behind the first `####`, as GSM8K marks it (Cobbe et al.
    2021, https://arxiv.org/abs/2110.14168); else the last one in the last `\\boxed{…}`; else the
    last one. Numbers are compared exactly; `exact_numbers.number_in` says what is one. The
    record's `answer` is a number, a text that is one, or one that ends `#### n` or has a box.
    """

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        target = _target(record)
        return float(_given(final_answer(prompt, response)) == target)


def _target(record: Record) -> Fraction:
    value = answer = field(record, "answer")
    if isinstance(answer, str):
        _, found, behind = answer.rpartition(_MARK)
        value = behind if found else (boxed(answer) or answer)
    number = exact(value)
    if number is None:
        shown = repr(answer) if len(repr(answer)) <= _SHOWN else f"{repr(answer)[:_SHOWN]}…"
        raise UserError(
            f"its `answer` is no number ({shown}); give one, a text that ends `#### n`, or take "
            "the reward exact_match."
        )
    return number


def _given(answer: str) -> Fraction | None:
    for place in (marked(answer), boxed(answer)):
        if place is not None:
            return number_in(place)
    return number_in(answer)
