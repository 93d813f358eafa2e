"""The answer in a written response, and whether it is the right one."""

import re
from decimal import Decimal, InvalidOperation

# A sign behind a digit, a letter or a bracket is an operation; 1.2.3 is no number, nor has any.
_NUMBER = (
    r"(?:(?<![\w)])[-+−–])?\$?(?<!\d)(?<!\d[.,])"
    r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)"
)
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
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
    return _plain(found[-1]) if found else ""


def is_right(extracted: str, target: str) -> bool:
    """Whether two answers are the same: as numbers, where the target is one, else as text."""
    value = _value(target)
    if value is None:
        return extracted == " ".join(target.split())
    return _value(extracted) == value


def _value(text: str) -> Decimal | None:
    text = _plain(text.strip())
    try:
        return Decimal(text) if _ANY.fullmatch(text) else None
    except InvalidOperation:
        return None


def _plain(number: str) -> str:
    return number.translate(_PLAIN)
