"""Tasks with known answers, generated: arithmetic, worked chains, last digits, countdown, copying,
sorting.

A task is a list of levels, and a level is a function that makes a record's fields from numbers it
draws. The first draws are the digits of the record's own number, so that two records of a level
never have the same prompt; the numbers of a level come in a pseudo-random order. So records are
distinct and reproducible, as many as there are can be asked for, and nothing is remembered.
"""

import bisect
import dataclasses
import functools
import itertools
import random
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.data.permutation import Permutation

TASKS_VERSION = 2
"""Changes when the same task, part and seed give other records."""

Fields = dict[str, Any]

_LARGEST_TARGET = 999  # of countdown, and of every step on the way


class Draw:
    """The numbers that one record is made from."""

    def __init__(self, number: int, key: str):
        """Draws for record `number` of a level; `key` seeds what does not come from the number."""
        self._number = number
        self._random = random.Random(key)

    def own(self, low: int, high: int) -> int:
        """One of `low … high`, the next digit of the record's own number."""
        self._number, digit = divmod(self._number, high - low + 1)
        return low + digit

    def any(self, below: int) -> int:
        """One of `0 … below - 1`, independent of the record's own number."""
        # Of `random`, the method whose values Python promises to keep.
        return int(self._random.random() * below)


@dataclasses.dataclass(frozen=True)
class Level:
    """Records of one difficulty."""

    make: Callable[[Draw], Fields]
    count: int
    """How many there are: the product of the ranges of `Draw.own`."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A generated source without its part and seed."""

    name: str
    levels: tuple[Level, ...]

    @property
    def count(self) -> int:
        """How many distinct records there are."""
        return sum(level.count for level in self.levels)

    def records(self, part: range, seed: int) -> Iterator[Fields]:
        """The records of `part`: in the order of `seed`, one of each level in turn while it has
        any left. Parts that do not overlap share no prompt.
        """
        turns = range(max(level.count for level in self.levels) + 1)
        turn = bisect.bisect_right(turns, part.start, key=self._before) - 1
        first = part.start - self._before(turn)
        return itertools.islice(self._from_turn(turn, seed), first, first + len(part))

    def _before(self, turn: int) -> int:
        """How many records the turns before this one have."""
        return sum(min(level.count, turn) for level in self.levels)

    def _from_turn(self, start: int, seed: int) -> Iterator[Fields]:
        keys = [f"{self.name} {seed} {number}" for number in range(len(self.levels))]
        orders = [
            Permutation(level.count, key) for level, key in zip(self.levels, keys, strict=True)
        ]
        for turn in range(start, max(level.count for level in self.levels)):
            for level, key, order in zip(self.levels, keys, orders, strict=True):
                if turn < level.count:
                    draw = Draw(order(turn), f"{key} {turn}")
                    fields = level.make(draw)
                    response = fields["response"]
                    yield fields | {"chosen": response, "rejected": _spoilt(draw, response)}


def _spoilt(draw: Draw, response: str) -> str:
    """The response with one digit or letter changed into another."""
    places = [place for place, sign in enumerate(response) if sign.isalnum()]
    place = places[draw.any(len(places))]
    signs = string.digits if response[place].isdigit() else string.ascii_lowercase
    shift = 1 + draw.any(len(signs) - 1)
    other = signs[(signs.index(response[place]) + shift) % len(signs)]
    return response[:place] + other + response[place + 1 :]


def _arithmetic(draw: Draw, operation: str, first: int, second: int) -> Fields:
    """`a operation b` of so many digits; of a division the digits of quotient and divisor."""
    a, b = draw.own(*_range(first)), draw.own(*_range(second, 1 if operation == "/" else 0))
    if operation == "/":
        a, result = a * b, a
    else:
        result = _OPERATIONS[operation](a, b)
    prompt = f"{a} {operation} {b} ="
    return _fields(prompt, str(result), text=f"{prompt} {result}")


def _chain(draw: Draw, length: int) -> Fields:
    """Sums, differences and products, each of the result before it."""
    value = draw.own(1, 99)
    sentences, working = [f"Start with {value}."], []
    for _ in range(length):
        operation, operand = "+-*"[draw.own(0, 2)], draw.own(2, 9)
        result = _OPERATIONS[operation](value, operand)
        sentences.append(f"{_IN_WORDS[operation]} {operand}.")
        working.append(f"{value} {operation} {operand} = {result}")
        value = result
    return _worked([*sentences, "What is the result?"], working, value)


def _last_digit(draw: Draw, length: int) -> Fields:
    """Sums and products of one digit, each of the last digit of the result before it."""
    value = draw.own(0, 9)
    sentences, working = [f"Start with {value}."], []
    for _ in range(length):
        operation, operand = _ONE_DIGIT[draw.own(0, len(_ONE_DIGIT) - 1)]
        result = _OPERATIONS[operation](value, operand)
        sentences.append(f"{_IN_WORDS[operation]} {operand}.")
        working.append(f"{value} {operation} {operand} = {result}")
        value = result % 10
    return _worked([*sentences, "What is the last digit?"], working, value)


def _worked(sentences: list[str], working: list[str], value: int) -> Fields:
    question, reasoning = " ".join(sentences), "\n".join(working)
    # The answer is marked as in GSM8K.
    fields = _fields(question, f"{reasoning}\n#### {value}", answer=str(value))
    return fields | {"question": question, "reasoning": reasoning}


def _countdown(draw: Draw, length: int) -> Fields:
    """Numbers 1 to 99 and a target of 1 to 999 that is none of them, with a way to reach it."""
    numbers = [draw.own(1, 99) for _ in range(length)]
    target, solution = numbers[0], ""
    while target in numbers:
        values = [(number, str(number)) for number in numbers]
        while len(values) > 1:
            one, other = (values.pop(draw.any(len(values))) for _ in range(2))
            values.append(_combined(draw, one, other))
        target, solution = values[0]
    listed = ", ".join(map(str, numbers[:-1]))
    prompt = f"Make {target} from {listed} and {numbers[-1]}, each used at most once, with + - * /."
    solution = solution.removeprefix("(").removesuffix(")")
    # No `answer`: the target stands in the prompt, so to copy it would be right.
    return {
        "text": f"{prompt}\n{solution}",
        "prompt": prompt,
        "response": solution,
        "numbers": numbers,
        "target": target,
        "solution": solution,
    }


def _combined(draw: Draw, one: tuple[int, str], other: tuple[int, str]) -> tuple[int, str]:
    """A whole number within range made of two, and how: there always is one."""
    (large, left), (small, right) = sorted((one, other), reverse=True)
    ways = [("+", large + small), ("-", large - small), ("*", large * small)]
    if large % small == 0:
        ways.append(("/", large // small))
    ways = [(sign, value) for sign, value in ways if 0 < value <= _LARGEST_TARGET]
    sign, value = ways[draw.any(len(ways))]
    return value, f"({left} {sign} {right})"


def _copying(draw: Draw, length: int) -> Fields:
    letters = " ".join(string.ascii_lowercase[draw.own(0, 25)] for _ in range(length))
    return _fields(f"Copy: {letters}", letters)


def _sorting(draw: Draw, length: int) -> Fields:
    numbers = [draw.own(0, 99) for _ in range(length)]
    return _fields(f"Sort: {_spaced(numbers)}", _spaced(sorted(numbers)))


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_IN_WORDS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}
# By these all last digits stay as likely as each other: to guess is right once in ten times.
_ONE_DIGIT = [*(("+", operand) for operand in range(2, 10)), ("*", 3), ("*", 7), ("*", 9)]


def _fields(prompt: str, response: str, answer: str = "", text: str = "") -> Fields:
    return {
        "text": text or f"{prompt}\n{response}",
        "prompt": prompt,
        "response": response,
        "answer": answer or response,
    }


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _range(digits: int, least: int = 0) -> tuple[int, int]:
    """The least and greatest number of so many digits."""
    return (least if digits == 1 else 10 ** (digits - 1)), 10**digits - 1


def _arithmetic_levels() -> Iterator[Level]:
    for first, second in itertools.product((1, 2, 3), repeat=2):
        for operation in "+-" if 3 in (first, second) else "+-*/":
            make = functools.partial(_arithmetic, operation=operation, first=first, second=second)
            low, high = _range(first)
            least, most = _range(second, 1 if operation == "/" else 0)
            yield Level(make, (high - low + 1) * (most - least + 1))


def _levels(
    make: Callable[..., Fields], lengths: range, count: Callable[[int], int]
) -> tuple[Level, ...]:
    """A level for each of `lengths`, passed on to `make`; `count` says how many records it has."""
    return tuple(Level(functools.partial(make, length=n), count(n)) for n in lengths)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("arithmetic", tuple(_arithmetic_levels())),
        Task("chain", _levels(_chain, range(2, 6), lambda length: 99 * 24**length)),
        Task(
            "last_digit",
            _levels(_last_digit, range(2, 6), lambda length: 10 * len(_ONE_DIGIT) ** length),
        ),
        Task("countdown", _levels(_countdown, range(3, 5), lambda length: 99**length)),
        Task("copying", _levels(_copying, range(2, 11), lambda length: 26**length)),
        Task("sorting", _levels(_sorting, range(2, 9), lambda length: 100**length)),
    )
}
"""Tasks by name."""
