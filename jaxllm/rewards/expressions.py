"""Arithmetic expressions, read and computed exactly; nothing of them is ever run as a program."""

import dataclasses
import re
from fractions import Fraction

LONGEST = 1000
"""Signs of an expression at the most; with them its value is bounded, as there are no powers."""

DEEPEST = 50
"""Parentheses within each other at the most, of which each is read by a call of its own."""

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|[-+*/()])", re.ASCII)
_SIGNS = {"×": "*", "÷": "/", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"}


@dataclasses.dataclass(frozen=True)
class Expression:
    """What an expression says."""

    value: Fraction
    numbers: tuple[Fraction, ...]
    """Those written in it, in order, without the signs before them."""


def compute(text: str) -> Expression:
    """Reads an expression of + - * /, parentheses, minus signs and ASCII decimal numbers.

    `×`, `÷`, `−` and LaTeX's `\\times`, `\\cdot`, `\\div` are read too.

    Raises:
        ValueError: it is none, is longer than `LONGEST` or nested deeper than `DEEPEST`, or
            divides by zero.
    """
    # Before the signs are replaced, which only shortens it.
    if len(text) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} signs")
    for written, sign in _SIGNS.items():
        text = text.replace(written, sign)
    reader = _Reader(_tokens(text.strip()))
    value = reader.sum()
    if reader.next:
        raise ValueError(f"{reader.next!r} stands where an operation should")
    return Expression(value, tuple(reader.numbers))


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place:].lstrip()[0]!r} is of no expression")
        tokens.append(match[1])
        place = match.end()
    return tokens


class _Reader:
    """Reads tokens from left to right, a method for each level of precedence."""

    def __init__(self, tokens: list[str]):
        self._tokens = iter(tokens)
        self._depth = 0
        self.numbers: list[Fraction] = []
        self.next = ""
        self._advance()

    def sum(self) -> Fraction:
        value = self._product()
        while self.next in ("+", "-"):
            operation, term = self._advance(), self._product()
            value = value + term if operation == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self.next in ("*", "/"):
            operation, factor = self._advance(), self._factor()
            if operation == "/" and not factor:
                raise ValueError("divides by zero")
            value = value * factor if operation == "*" else value / factor
        return value

    def _factor(self) -> Fraction:
        sign = 1
        while self.next == "-":
            self._advance()
            sign = -sign
        token = self._advance()
        if token == "(":
            return sign * self._inside()
        if not token or token in "+*/)":
            raise ValueError("a number is missing")
        self.numbers.append(Fraction(token))
        return sign * self.numbers[-1]

    def _inside(self) -> Fraction:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError(f"has more than {DEEPEST} parentheses within each other")
        value = self.sum()
        if self._advance() != ")":
            raise ValueError("a parenthesis is not closed")
        self._depth -= 1
        return value

    def _advance(self) -> str:
        """Takes the next token; empty at the end."""
        taken, self.next = self.next, next(self._tokens, "")
        return taken
