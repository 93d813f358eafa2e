"""What operators, methods and filters of a template make, in steps, before they make it.

An element, a place that is padded, or a bit of a number is a step; of text that is put together out
of text, which templates do with whole conversations, so many characters are one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

CHARACTERS_PER_STEP = 500
CHARGED_FILTERS = (
    "batch",
    "center",
    "format",
    "indent",
    "replace",
    "round",
    "slice",
    "tojson",
    "wordwrap",
)
"""Filters beside `join` whose size their arguments tell."""

_PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "to_bytes")


def operator_steps(operator: str, left: Any, right: Any) -> int:
    """Of what an operator makes of small operands."""
    match operator, left, right:
        case "+", Sized(), Sized():
            return (len(left) + len(right)) // CHARACTERS_PER_STEP
        case "*", int(), int():
            return left.bit_length() + right.bit_length()
        case ("*", Sized() as row, int() as times) | ("*", int() as times, Sized() as row):
            return len(row) * max(times, 0)
        case "**", int(), int():
            return left.bit_length() * max(right, 0)
        case "%", str() | bytes(), _:
            return _format_steps(left, right if isinstance(right, tuple) else (right,))
    return 0


def method_steps(function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Of what a method of Python's own types makes; 0 for what else is called."""
    function = getattr(function, "__wrapped__", function)  # jinja2's own `str.format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    given = (*arguments, *named.values())
    match owner, name:
        case ((str() | bytes() | int()), _) if name in _PADDING_METHODS:
            return _widest(given)
        case ((str() | bytes()), "expandtabs"):
            return _widest(given) * len(owner)
        case str(), "format" | "format_map":
            return _format_steps(owner, given)
        case str(), "replace" | "translate" | "join":
            return filter_steps(name, owner, given)
    return 0


def filter_steps(name: str, value: Any, given: Sequence[Any]) -> int:
    """Of what a filter makes of a value; `given` are its arguments.

    `join` is told as the method is: the text between is the value.
    """
    text = value if isinstance(value, str) else ""
    match name, given:
        case "replace", (str() as old, str() as new, *_):
            return text.count(old) * len(new) // CHARACTERS_PER_STEP
        case "translate", (Mapping() as table, *_):
            longest = max((len(new) for new in table.values() if isinstance(new, str)), default=0)
            return len(text) * longest // CHARACTERS_PER_STEP
        case "join", (Iterable() as parts, *_) if isinstance(parts, Sized):
            sizes = [len(part) if isinstance(part, Sized) else 1 for part in parts]
            return (sum(sizes) + len(sizes) * len(text)) // CHARACTERS_PER_STEP
        case "wordwrap", _:
            longest = max((len(each) for each in given if isinstance(each, str)), default=0)
            return len(text) * longest // CHARACTERS_PER_STEP
        case "indent", _:
            return _widest(given, texts=True) * (text.count("\n") + 1)
        case "format", _:
            return _format_steps(text, given)
        case "center" | "batch" | "slice" | "round" | "tojson", _:
            return _widest(given)
    return 0


def _format_steps(text: str | bytes, given: Sequence[Any]) -> int:
    """Of widths and precisions, which may stand in the text or among what is put into it."""
    nested = str(text).count("*") + str(text).count("{")
    return sum(map(int, re.findall("[0-9]+", str(text)))) + nested * _widest(given)


def _widest(given: Iterable[Any], texts: bool = False) -> int:
    """The largest number, or length of a text, among arguments."""
    sizes = [abs(each) for each in given if isinstance(each, int)]
    sizes += [len(each) for each in given if texts and isinstance(each, str)]
    return max(sizes, default=0)
