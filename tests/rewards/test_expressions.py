"""Expressions: their values against Python's own on generated ones; hostile ones are refused."""

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.rewards.expressions import DEEPEST, LONGEST, compute


@st.composite
def expressions(draw, depth=4):
    """A text, and its value by Fractions; None where something is divided by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), [number]
    if draw(st.integers(0, 4)) == 0:
        text, value, numbers = draw(expressions(depth=depth - 1))
        return f"-({text})", None if value is None else -value, numbers
    sign = draw(st.sampled_from("+-*/"))
    (left, a, ones), (right, b, others) = (draw(expressions(depth=depth - 1)) for _ in range(2))
    if a is None or b is None or (sign == "/" and b == 0):
        value = None
    else:
        value = {
            "+": lambda: a + b,
            "-": lambda: a - b,
            "*": lambda: a * b,
            "/": lambda: a / b,
        }[sign]()
    space = draw(st.sampled_from(["", " ", "\t"]))
    return f"({left}){space}{sign}{space}({right})", value, ones + others


@given(expressions())
def test_values_are_exact_and_numbers_are_all_there(made):
    text, value, numbers = made
    if value is None:
        with pytest.raises(ValueError, match="divides by zero"):
            compute(text)
    else:
        found = compute(text)
        assert found.value == value
        assert list(found.numbers) == numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14),
        ("2 * 3 + 4", 10),
        ("10 - 4 - 3", 3),
        ("24 / 4 / 3", 2),
        ("24 / 4 * 3", 18),
        ("-2 * -3", 6),
        ("2 - -3", 5),
        ("--2", 2),
        ("-(1 + 2)", -3),
        ("1 / 3 * 3", 1),
        (".5 + 0.25", Fraction(3, 4)),
        ("007", 7),
        ("2 × 3 ÷ 4 − 1", Fraction(1, 2)),
        (r"2 \times 3 \div 4 \cdot 2", 3),
        (" ( 7 ) ", 7),
    ],
)
def test_known_values(text, value):
    assert compute(text).value == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a number is missing"),
        ("1 +", "a number is missing"),
        ("* 2", "a number is missing"),
        ("+2", "a number is missing"),
        ("()", "a number is missing"),
        ("9**9**9", "a number is missing"),
        ("8 // 3", "a number is missing"),
        ("(1 + 2", "a parenthesis is not closed"),
        ("1 2", "'2' stands where an operation should"),
        ("2(3)", "'\\(' stands where"),
        ("1)", "'\\)' stands where"),
        ("1.2.3", "'.3' stands where"),
        ("1.", "'.' is of no expression"),
        ("1e3", "'e' is of no expression"),
        ("1_000", "'_' is of no expression"),
        ("١ + ٢", "is of no expression"),
        ("１＋２", "is of no expression"),
        ("2²", "is of no expression"),
        ("3 = 3", "'=' is of no expression"),
        ("__import__('os').system('x')", "'_' is of no expression"),
        ("abs(1)", "'a' is of no expression"),
        ("1 if 1 else 2", "'i' is of no expression"),
        ("\ud800", "is of no expression"),
        ("1\x00", "is of no expression"),
        ("1 / 0", "divides by zero"),
        ("1 / (2 - 2)", "divides by zero"),
        ("(" * 10**5 + "1" + ")" * 10**5, "is longer than"),
        ("1" * 10**6, "is longer than"),
        ("(" * 400 + "1" + ")" * 400, "has more than 50 parentheses"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_expression_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        compute(text)


def test_limits_are_what_they_say():
    def nested(depth):
        return "(" * depth + "1" + ")" * depth

    assert compute(nested(DEEPEST)).value == 1
    assert compute("+".join([nested(DEEPEST)] * 9)).value == 9  # in a row is not within
    with pytest.raises(ValueError, match="within each other"):
        compute(nested(DEEPEST + 1))
    assert compute("-" * (LONGEST - 1) + "1").value == -1
    assert compute("9" * LONGEST).value == 10**LONGEST - 1
    with pytest.raises(ValueError, match="longer"):
        compute("1" * (LONGEST + 1))


@given(st.text(st.sampled_from("0123456789.+-*/() e_×")))
def test_any_text_is_computed_or_refused(text):
    with contextlib.suppress(ValueError):
        assert isinstance(compute(text).value, Fraction)
