"""Right and wrong answers, as texts and as numbers; records that cannot be judged by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import UserError
from jaxllm.rewards.verifiers import ExactMatch, Numeric


def score(reward, response, answer):
    (value,) = reward(["?"], [response], [{"answer": answer}])
    assert type(value) is float
    return value


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (" a  b\n", "a b", 1),
        ("<think>no</think>a b", "a\nb", 1),
        ("18", 18, 1),
        ("2.5", 2.5, 1),
        ("北京", "北京", 1),
        ("A b", "a b", 0),
        ("ab", "a b", 0),
        ("a b c", "a b", 0),
        ("", "a", 0),
        ("\ud800", "a", 0),
    ],
)
def test_exact_match_is_of_the_whole_answer_but_for_white_space(response, answer, value):
    assert score(ExactMatch(), response, answer) == value


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("18", "18", 1),
        ("It is 18.", 18, 1),
        ("18.00", "18", 1),
        ("1,800", "$1800", 1),
        ("0.75", "3/4", 1),
        (r"\boxed{\frac{3}{4}}", 0.75, 1),
        (r"\boxed{18 \text{ of } \{x\}}, not 7", "18", 1),
        ("3 + 15\n#### 18\n\nQuestion: 99\n#### 7", "9 * 2 = 18\n#### 18", 1),
        (r"#### 18, not \boxed{7}", "18", 1),
        ("18", r"So it is \boxed{18}.", 1),
        ("50%", "50", 1),
        ("50%", "0.5", 0),
        ("0.3", 0.1 + 0.2, 0),
        ("0.1", 0.1, 1),
        ("0.33333333333333333333", "1/3", 0),
        ("9007199254740993", "9007199254740992", 0),
        ("-18", "18", 0),
        (r"18 and \boxed{7}", "18", 0),
        (r"18 and \boxed{x}", "18", 0),
        ("18 #### 5/0", "18", 0),
        ("<think>18</think> I do not know", "18", 0),
        ("<think>18", "18", 0),
        ("", "0", 0),
        ("no idea", "0", 0),
        ("1" * 10**6, "1", 0),
        ("1e999999999", "1", 0),
        ("{" * 10**5 + r"\boxed{" * 10**5, "1", 0),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_numbers_are_compared_exactly(response, answer, value):
    assert score(Numeric(), response, answer) == value


@given(st.fractions(), st.fractions())
def test_two_numbers_are_one_only_if_they_are_equal(one, other):
    assert score(Numeric(), f"It is {one}", str(other)) == (one == other)


@pytest.mark.parametrize("reward", [ExactMatch(), Numeric()])
def test_a_record_must_have_an_answer(reward):
    with pytest.raises(
        UserError, match=r"^it has no `answer` \(it has prompt, x\); give it one\.$"
    ):
        reward(["?"], ["1"], [{"prompt": "?", "x": 1}])
    with pytest.raises(UserError, match=r"\(it has no field\)"):
        reward(["?"], ["1"], [{}])
    with pytest.raises(UserError, match="it has no `answer`"):
        reward(["?"], ["1"], [{"answer": None}])


def test_an_answer_to_match_is_a_text_or_a_number_and_not_blank():
    with pytest.raises(UserError, match=r"^its `answer` is list; give a text or a number\.$"):
        score(ExactMatch(), "1", ["1"])
    with pytest.raises(UserError, match="its `answer` is bool"):
        score(ExactMatch(), "True", True)
    with pytest.raises(UserError, match="its `answer` is empty, and so would be right"):
        score(ExactMatch(), "", " \n")


@pytest.mark.parametrize("answer", ["eighteen", "18 apples", "#### x", True, [18], "x" * 100])
def test_an_answer_that_is_no_number_is_told(answer):
    message = r"^its `answer` is no number \(.{1,70}\); give one, a text that ends `#### n`, or"
    with pytest.raises(UserError, match=message):
        score(Numeric(), "18", answer)
