"""The answer in a response: known ones."""

import pytest

from jaxllm.evaluation.answers import extract, is_right


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (" 18", "18"),
        ("She has 3 + 15 = 18 left.\n#### 18\n\nQuestion: 99", "18"),
        ("#### $1,800.50 #### 7", "1800.50"),
        ("The answer is 12, not 13.", "13"),
        ("it costs $2,000.", "2000"),
        ("minus: -4", "-4"),
        ("−4", "-4"),
        ("10-4", "4"),
        ("x = .5", ".5"),
        ("cost: –4", "-4"),
        ("3–4", "4"),
        ("about 1e3", "1e3"),
        ("1.5E-2 m", "1.5E-2"),
        ("7, as 1.2.3 says", "7"),
        ("1,234.5.6", ""),
        ("3/4", "4"),
        ("It is 18.", "18"),
        ("no idea", ""),
        ("", ""),
        ("####", ""),
    ],
)
def test_a_number_is_the_marked_one_or_the_last(response, extracted):
    assert extract(response, "18") == extracted


@pytest.mark.parametrize(
    ("response", "target", "right"),
    [
        ("18.00", "18", True),
        ("1,800", "1800", True),
        ("0.5", ".5", True),
        ("1e3", "1000", True),
        ("–4", "-4", True),
        ("1e99999999999999999999", "18", False),
        ("-3", "3", False),
        ("181", "18", False),
        ("", "0", False),
        (" a b  c\n", "a b c", True),
        ("a b c d", "a b c", False),
        ("A b c", "a b c", False),
        ("3 1 2", "1 2 3", False),
        ("1 2 3", "1 2 3", True),
        ("1/2", "1/2", True),
    ],
)
def test_numbers_are_compared_as_numbers_and_all_else_as_text(response, target, right):
    assert is_right(extract(response, target), target) is right
