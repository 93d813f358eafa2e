"""Numbers of texts and records as exact fractions, so that none is compared by its rounding."""

import math
import numbers
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from jaxllm.evaluation.answers import NUMBER, plain_number

_QUOTIENT = rf"{NUMBER}(?: ?/ ?{NUMBER})*"
_ARGUMENT = rf"(?:\{{ ?(?:{NUMBER}) ?\}}| ?\d)"
_LATEX = rf"(?:(?<![\w)])[-+−–])?\\[dt]?frac{_ARGUMENT}{_ARGUMENT}"
_ANY = re.compile(rf"{_LATEX}|{_QUOTIENT}")
_MARKED = re.compile(rf"####\s*({_LATEX}|{_QUOTIENT})")
_WHOLE = re.compile(rf"({_LATEX}|{_QUOTIENT}) ?%?")
_ARGUMENTS = re.compile(_ARGUMENT)

# Of LaTeX: spaces, and the comma of thousands.
_SPACING = re.compile(r"\\[,!;: ]")
_ESCAPES = {"{,}": ",", "\\$": "$", "\\%": "%"}

_MOST_SIGNS = 400  # of one number: an int of more than some thousand digits Python refuses
_LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory


def number_in(text: str) -> Fraction | None:
    """The last number that stands in a text; None if none does.

    Written as `answers.NUMBER` says, or as a fraction of two such, `3/4` or `\\frac{3}{4}`. A
    percent sign is a unit, as `$` is: 50% is 50. No numbers are 12/05/2020, what is divided by 0,
    and what has more than 400 signs or an exponent beyond ±400.
    """
    for written in reversed(_ANY.findall(_plain_latex(text))):
        value = _value(written)
        if value is not None:
            return value
    return None


def marked(text: str) -> str | None:
    """What stands behind the first `####` that a number follows: that number, as it is written."""
    match = _MARKED.search(_plain_latex(text))
    return match[1] if match else None


def exact(value: Any) -> Fraction | None:
    """A field of a record as a number; None if it is none.

    A text must be a number as a whole, see `number_in`. A float counts as what it is written as:
    0.1 is 1/10.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Rational):  # of NumPy's integers the parts are its own
        return Fraction(int(value.numerator), int(value.denominator))
    if isinstance(value, numbers.Real | Decimal):
        value = str(value)
    if not isinstance(value, str):
        return None
    match = _WHOLE.fullmatch(_plain_latex(value).strip())
    return _value(match[1]) if match else None


def _plain_latex(text: str) -> str:
    for written, plain in _ESCAPES.items():
        text = text.replace(written, plain)
    return _SPACING.sub("", text)


def _value(written: str) -> Fraction | None:
    if "frac" in written:
        sign = -1 if written[0] in "-−–" else 1
        parts = [part.strip("{} ") for part in _ARGUMENTS.findall(written.partition("frac")[2])]
    else:
        sign, parts = 1, written.split("/")
    if len(parts) > 2:
        return None
    values = [value for value in map(_single, parts) if value is not None]
    if len(values) < len(parts) or 0 in values[1:]:
        return None
    return sign * values[0] / math.prod(values[1:])


def _single(written: str) -> Fraction | None:
    plain = plain_number(written.strip())
    _, _, exponent = plain.lower().partition("e")
    if len(plain) > _MOST_SIGNS or (exponent and abs(int(exponent)) > _LARGEST_EXPONENT):
        return None
    return Fraction(plain)
