"""Numbers in texts and records: known ones, exactness, and what is none."""

import decimal
import math
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.rewards.exact_numbers import exact, marked, number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first 7, then 18", Fraction(18)),
        ("it costs $1,234.50.", Fraction(2469, 2)),
        ("3/4", Fraction(3, 4)),
        ("about 3 / 4 of it", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("3/-4", Fraction(-3, 4)),
        ("1.5/0.5", Fraction(3)),
        ("5 km/h", Fraction(5)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 3 }{-4}", Fraction(3, 4)),
        (r"−\tfrac34", Fraction(-3, 4)),
        (r"7-\frac{1}{2}", Fraction(1, 2)),
        (r"1{,}000\,000 \$", Fraction(1_000_000)),
        ("50%", Fraction(50)),
        (r"50\%", Fraction(50)),
        ("2.5e-1", Fraction(1, 4)),
        ("10-4", Fraction(4)),
        ("–4", Fraction(-4)),
        ("等于１８。", Fraction(18)),
        ("七 18元", Fraction(18)),
        ("18 on 12/05/2020", Fraction(18)),
        ("18, for 5/0 is none", Fraction(18)),
        ("18 or 1e401", Fraction(18)),
        ("18 or " + "1" * 401, Fraction(18)),
        ("1.2.3", None),
        (r"\frac{1}{0}", None),
        ("no idea", None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_the_number_of_a_text_is_its_last(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (18, Fraction(18)),
        (0.1, Fraction(1, 10)),
        (np.float32(0.1), Fraction(1, 10)),
        (np.int64(3), Fraction(3)),
        (Decimal("0.30"), Fraction(3, 10)),
        (Fraction(1, 3), Fraction(1, 3)),
        (1e300, Fraction(10) ** 300),
        (" $1,800 ", Fraction(1800)),
        ("50 %", Fraction(50)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("18 dollars", None),
        ("a 18", None),
        ("1 2", None),
        ("", None),
        (True, None),
        (math.nan, None),
        (math.inf, None),
        (Decimal("1e999999"), None),
        (None, None),
        ([18], None),
    ],
)
def test_a_field_is_a_number_as_a_whole(value, number):
    assert exact(value) == number


def test_the_parts_of_a_fraction_are_pythons_own_integers():
    assert exact(np.int64(2**62)) * 4 == 2**64


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7\n#### 18\n#### 19", "18"),
        ("####$1,800", "$1,800"),
        ("#### x, #### 3/4", "3/4"),
        ("18", None),
    ],
)
def test_the_first_mark_with_a_number_counts(text, found):
    assert marked(text) == found


@given(st.fractions(), st.text(st.characters(categories=["L"], exclude_characters="eE")))
def test_fractions_are_read_back_exactly(number, word):
    assert number_in(f"{word} {number}") == number
    assert exact(f"\\frac{{{number.numerator}}}{{{number.denominator}}}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20))
def test_decimals_are_read_back_exactly(number):
    with decimal.localcontext(prec=60):
        assert number_in(f"x = {number:,}") == Fraction(number)


@given(st.text())
def test_any_text_is_read(text):
    assert number_in(text) is None or isinstance(number_in(text), Fraction)
    assert exact(text) is None or isinstance(exact(text), Fraction)


@pytest.mark.parametrize(
    "unit", ["1", "1,", "1/", "1.", "-", "$", "#### ", "1e", "1 ", "\\frac{", "\\frac1", "1,,1.2.3"]
)
def test_reading_takes_time_in_proportion(unit):
    def seconds(count):
        text, begin = unit * (count // len(unit)), time.process_time()
        number_in(text), marked(text), exact(text)
        return time.process_time() - begin

    assert seconds(200_000) < 2  # a quadratic way would take minutes
