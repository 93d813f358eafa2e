"""Countdown: the built-in records' own solutions are right, and what breaks the rules is not."""

import itertools

import pytest

from jaxllm.data.tasks import TASKS
from jaxllm.errors import UserError
from jaxllm.rewards.arithmetic import Arithmetic

RECORD = {"numbers": [3, 5, 5], "target": 25}


def score(response, record=RECORD, **options):
    return Arithmetic(**options)(["?"], [response], [record])[0]


def test_solutions_of_built_in_records_are_right():
    records = list(itertools.islice(TASKS["countdown"].records(range(200), 0), 200))
    prompts = [record["prompt"] for record in records]
    solutions = [record["solution"] for record in records]
    assert Arithmetic(use_all=True)(prompts, solutions, records) == [1.0] * 200
    shifted = [dict(record, target=record["target"] + 1) for record in records]
    assert Arithmetic()(prompts, solutions, shifted) == [0.0] * 200


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("5 * 5", 1),
        ("<think>3 + 5</think>\n5 * 5", 1),
        ("First 3 + 5.\n\n5 * 5\n", 1),
        ("<answer>5 * 5</answer>", 1),
        (r"It is \boxed{5 \times 5}.", 1),
        ("5 * 5 = 25", 1),
        ("`5 * 5`", 1),
        ("$5*5$.", 1),
        ("5 * 5 / (3 - 3)", 0),
        ("5 * 5 = 24", 0),
        ("5 * 5 = 20 + 5", 0),
        ("25 = 5 * 5", 0),
        ("5 * 5 = 25 = 25", 0),
        ("25", 0),
        ("5 * 5 * 5 / 5", 0),
        ("3 * 5 + 10", 0),
        ("5 + 5", 0),
        ("5 ** 5", 0),
        ("The answer is 5 * 5", 0),
        ("5 * 5\nor so", 0),
        ("<think>5 * 5", 0),
        ("", 0),
        ("\n", 0),
        ("\ud800", 0),
        ("__import__('os')", 0),
        ("9**9**9", 0),
        ("٥ * ٥", 0),
        ("(" * 10**5 + "5 * 5" + ")" * 10**5, 0),
        ("5" * 10**6, 0),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_expression_keeps_to_the_numbers_and_makes_the_target(response, value):
    assert score(response) == value


def test_each_number_may_have_to_be_used():
    assert score("5 * 5", use_all=True) == 0
    assert score("5 * 5 * 3 / 3", use_all=True) == 0
    assert score("(3 + 5) * 5", {"numbers": [3, 5, 5], "target": 40}, use_all=True) == 1


def test_an_expression_that_only_keeps_to_the_numbers_may_get_a_part():
    assert score("5 + 5", partial=0.1) == 0.1
    assert score("5 * 5 = 24", partial=0.1) == 0.1
    assert score("5 * 5", partial=0.1) == 1
    assert score("25", partial=0.1) == 0
    assert score("5 + 5", partial=0.1, use_all=True) == 0
    assert score("hello", partial=0.1) == 0
    for partial in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="partial: must be from 0 to below 1"):
            Arithmetic(partial=partial)


def test_numbers_of_records_may_be_decimals_and_texts():
    assert score("0.5 * 4", {"numbers": [0.5, "4"], "target": 2.0}) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"target": 3}, r"^it has no `numbers` \(it has target\); give it one\.$"),
        ({"numbers": [1, 2]}, "it has no `target`"),
        ({"numbers": [], "target": 3}, "its `numbers` are no list of numbers, or an empty one"),
        ({"numbers": "12", "target": 3}, "its `numbers` are no list of numbers"),
        ({"numbers": [1, "x"], "target": 3}, "its `numbers` holds 'x', which is no number"),
        ({"numbers": [1, 2], "target": "x"}, "its `target` holds 'x', which is no number"),
    ],
)
def test_a_record_that_cannot_be_judged_by_is_told(record, message):
    with pytest.raises(UserError, match=message):
        score("1 + 2", record)
