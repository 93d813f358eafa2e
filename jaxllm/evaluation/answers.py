"""The answer in a written response, and whether it is the right one."""

import re
from decimal import Decimal, InvalidOperation

# A sign behind a digit, a letter or a bracket is an operation; 1.2.3 is no number, nor has any.
NUMBER = (
    r"(?:(?<![\w)])[-+−–])?\$?(?<!\d)(?<!\d[.,])"
    r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)"
)
"""A regular expression, without groups, of a number as it is written; see `plain_number`."""

_MARKED = re.compile(rf"####\s*({NUMBER})")
_ANY = re.compile(NUMBER)
_PLAIN = str.maketrans({",": "", "$": "", "−": "-", "–": "-"})


def extract(response: str, target: str) -> str:
    """The answer that `response` gives, to be compared with `target`.

    Where the target is a number: the one behind the first `####` (as GSM8K marks it, Cobbe et al.
    2021, https://arxiv.org/abs/2110.14168), else the last one of the response; empty if it holds
    none. Of 3/4 these are two numbers. Otherwise the whole response, white space made plain.
    """
    if _value(target) is None:
        return " ".join(response.split())
    marked = _MARKED.search(response)
    found = [marked[1]] if marked else _ANY.findall(response)
    return plain_number(found[-1]) if found else ""


def is_right(extracted: str, target: str) -> bool:
    """Whether two answers are the same: as numbers, where the target is one, else as text."""
    value = _value(target)
    if value is None:
        return extracted == " ".join(target.split())
    return _value(extracted) == value


def plain_number(number: str) -> str:
    """What `NUMBER` has matched without `$` and the commas of thousands, its sign an ASCII one."""
    return number.translate(_PLAIN)


def _value(text: str) -> Decimal | None:
    text = plain_number(text.strip())
    try:
        return Decimal(text) if _ANY.fullmatch(text) else None
    except InvalidOperation:
        return None
