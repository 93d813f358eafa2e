"""The reward of countdown: an expression that makes a target from given numbers."""

import collections
import dataclasses
from fractions import Fraction

from jaxllm.errors import UserError
from jaxllm.rewards.exact_numbers import exact
from jaxllm.rewards.expressions import compute
from jaxllm.rewards.final_answer import boxed, final_answer
from jaxllm.rewards.reward import OneByOne, Record, field


@dataclasses.dataclass(frozen=True)
class Arithmetic(OneByOne):
    """1 for an expression that equals the record's `target` and uses each of its `numbers` at most
    once; `partial` for one that keeps to the numbers and equals something else; 0 for all else.

    The expression is what the last `\\boxed{…}` of the final answer holds, or its last line that
    is not blank; `= n` may follow, and then n must be the target too. `expressions.compute` says
    what is one.
    """

    use_all: bool = False
    """Whether each number has to be used."""
    partial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.partial < 1:
            raise ValueError("partial: must be from 0 to below 1")

    def score(self, prompt: str, response: str, record: Record) -> float:
        """See `OneByOne`."""
        numbers, target = _numbers(record), _number(field(record, "target"), "target")
        written, equals, result = _expression(final_answer(prompt, response)).partition("=")
        try:
            expression = compute(written)
        except ValueError:
            return 0.0
        used = collections.Counter(expression.numbers)
        if used - numbers or (self.use_all and numbers - used):
            return 0.0
        right = expression.value == target and (not equals or exact(result) == target)
        return 1.0 if right else self.partial


def _expression(answer: str) -> str:
    box = boxed(answer)
    lines = answer.splitlines()  # it ends in no blank one
    text = box if box is not None else (lines[-1] if lines else "")
    return text.strip("$` ").rstrip(".$` ")


def _numbers(record: Record) -> collections.Counter[Fraction]:
    numbers = field(record, "numbers")
    if not isinstance(numbers, list | tuple) or not numbers:
        raise UserError("its `numbers` are no list of numbers, or an empty one; give one.")
    return collections.Counter(_number(number, "numbers") for number in numbers)


def _number(value: object, name: str) -> Fraction:
    number = exact(value)
    if number is None:
        raise UserError(f"its `{name}` holds {value!r}, which is no number; give one.")
    return number
