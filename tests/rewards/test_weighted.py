"""Rewards together: totals, and what is told of a function that fails or gives no numbers."""

import re
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import Preempted, UserError
from jaxllm.rewards.verifiers import Numeric
from jaxllm.rewards.weighted import Rewards, WeightedReward, from_scorer

PROMPTS, RESPONSES = ["Make 3.", "Make\n4, " + "please " * 20, "\ud800"], ["a", "bb", ""]
RECORDS = [{"answer": "3"}, {"answer": "4"}, {"answer": "5"}]


class Column:
    """One row of a table, which some libraries make a number of."""

    ndim = 1

    def __float__(self):
        return 1.0


def lengths(prompts, responses, records):
    return [len(response) for response in responses]


def returning(values):
    return WeightedReward("mine", lambda prompts, responses, records: values)


def message(reward, prompts=PROMPTS, responses=RESPONSES, records=RECORDS):
    with pytest.raises(UserError) as told:
        reward(prompts, responses, records)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_the_total_is_weighted_and_the_parts_are_not():
    firsts = WeightedReward(
        "first", lambda p, r, records: [float(x["answer"]) for x in records], 2.0
    )
    rewards = Rewards(
        (firsts, WeightedReward("length", lengths, -0.5), WeightedReward("none", lengths, 0.0))
    )
    scores = rewards(PROMPTS, RESPONSES, RECORDS)
    assert scores.total.tolist() == [5.5, 7.0, 10.0]
    assert scores.total.dtype == np.float64
    assert {name: values.tolist() for name, values in scores.by_name.items()} == {
        "first": [3, 4, 5],
        "length": [1, 2, 0],
        "none": [1, 2, 0],
    }


def test_no_responses_have_no_scores():
    assert Rewards((WeightedReward("length", lengths),))([], [], []).total.shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, True),
        np.array([1, 2.5, 1]),
        np.array([1, 2.5, 1], np.float32),
        jnp.array([1, 2.5, 1]),
        jnp.array([1, 2.5, 1], jnp.bfloat16),
        [np.float32(1), np.array(2.5), np.bool_(True)],
        [Fraction(1), Decimal("2.5"), jnp.array(1)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_any_kind_are_taken(values):
    assert returning(values)(PROMPTS, RESPONSES, RECORDS).tolist() == [1, 2.5, 1]


@pytest.mark.parametrize(
    "wrong",
    [float("nan"), float("inf"), -np.inf, None, "1", b"1", 1j, [1.0], Column(), 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_that_is_no_finite_number_is_told_with_its_record(wrong):
    told = message(returning([1.0, wrong, wrong]))
    assert told.startswith("the reward mine, record 1 (prompt 'Make 4, please please ")
    assert f"…'): it gives {repr(wrong)[:60]}" in told
    assert told.endswith(", which is no finite number; return one.")
    assert len(told) < 260


@pytest.mark.parametrize("wrong", [None, 1.0, "abc", b"abc", {0: 1, 1: 1, 2: 1}, iter([1, 1, 1])])
def test_what_is_no_list_is_told(wrong):
    told = message(returning(wrong))
    assert told.startswith("the reward mine: it returns ")
    kind = type(wrong).__name__
    assert told.endswith(f"the type {kind}; return a list of numbers, one for each response.")


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_values_is_told(count):
    assert message(returning([1.0] * count)) == (
        f"the reward mine: it returns {count} numbers for 3 responses; return one for each, in "
        "their order."
    )


def test_a_function_that_raises_is_told_with_the_first_record_it_raises_for():
    calls = []

    def failing(prompts, responses, records):
        calls.append(len(records))
        return [1 / (len(response) - 2) for response in responses]

    told = message(WeightedReward("mine", failing))
    assert calls == [3, 1, 1]
    assert re.fullmatch(
        r"the reward mine, record 1 \(prompt 'Make 4, .{52}…'\): it raises ZeroDivisionError: "
        r"(float )?division by zero \(test_weighted.py:\d+\); mend it\.",
        told,
    )


def test_a_function_that_raises_for_none_alone_is_told_so():
    def failing(prompts, responses, records):
        if len(records) > 1:
            raise RuntimeError("a long\nstory " * 100)
        return [1.0]

    told = message(WeightedReward("mine", failing))
    assert told.startswith(
        "the reward mine, for 3 records at once and for none of them alone: it raises "
        "RuntimeError: a long story a long"
    )
    assert len(told) < 400


def test_a_name_of_an_exception_stands_without_a_text_too():
    def failing(prompts, responses, records):
        raise KeyError

    assert "it raises KeyError (test_weighted" in message(WeightedReward("mine", failing))


def test_a_record_that_a_verifier_cannot_judge_by_is_told():
    records = [*RECORDS[:2], {"answer": "five"}]
    assert message(WeightedReward("numeric", Numeric()), records=records) == (
        "the reward numeric, record 2 (prompt '\\ud800'): its `answer` is no number ('five'); give "
        "one, a text that ends `#### n`, or take the reward exact_match."
    )


@pytest.mark.parametrize("error", [TimeoutError(110, "x"), OSError("timed out"), Preempted("x")])
def test_what_is_no_mistake_goes_on_as_it_is(error):
    def failing(prompts, responses, records):
        raise error

    with pytest.raises(type(error)) as raised:
        WeightedReward("mine", failing)(PROMPTS, RESPONSES, RECORDS)
    assert raised.value is error


def test_a_server_that_has_not_answered_is_not_asked_for_each_record():
    calls = []

    def failing(prompts, responses, records):
        calls.append(None)
        if len(calls) == 1:
            raise TimeoutError(110, "x")
        return [1.0]

    with pytest.raises(TimeoutError):
        WeightedReward("mine", failing)(PROMPTS, RESPONSES, RECORDS)
    assert len(calls) == 1


def test_a_server_may_stop_answering_while_the_record_is_looked_for():
    def failing(prompts, responses, records):
        raise ValueError("x") if len(records) > 1 else TimeoutError(110, "x")

    with pytest.raises(TimeoutError):
        WeightedReward("mine", failing)(PROMPTS, RESPONSES, RECORDS)


def test_a_reward_model_is_one_of_them_and_its_errors_are_its_own():
    calls = []

    def scorer(prompts, responses):
        calls.append((prompts, responses))
        return np.arange(len(prompts))

    model = WeightedReward("reward_model", from_scorer(scorer), 2.0, is_model=True)
    rewards = Rewards((model, WeightedReward("length", lengths)))
    assert rewards(PROMPTS, RESPONSES, RECORDS).total.tolist() == [1, 4, 4]
    assert calls == [(PROMPTS, RESPONSES)]

    def failing(prompts, responses):
        calls.append(None)
        raise RuntimeError("out of memory")

    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        WeightedReward("reward_model", from_scorer(failing), is_model=True)(
            PROMPTS, RESPONSES, RECORDS
        )
    assert calls == [None]  # once: other processes would wait for a second time


def test_a_function_cannot_change_what_others_see():
    def emptying(prompts, responses, records):
        counts = [float(len(response)) for response in responses]
        prompts.clear(), responses.clear(), records.clear()
        return counts

    rewards = Rewards((WeightedReward("one", emptying), WeightedReward("other", lengths)))
    assert rewards(PROMPTS, RESPONSES, RECORDS).total.tolist() == [2, 4, 0]


def test_rewards_are_some_and_of_different_names():
    with pytest.raises(ValueError, match="there is no reward"):
        Rewards(())
    with pytest.raises(ValueError, match="two rewards have one name: a, a"):
        Rewards((WeightedReward("a", lengths), WeightedReward("a", lengths)))


def test_there_is_a_prompt_and_a_record_for_each_response():
    with pytest.raises(ValueError, match="1 prompts, 3 responses, 3 records"):
        Rewards((WeightedReward("a", lengths),))(["?"], RESPONSES, RECORDS)
