"""Responses as rows, and what they are worth."""

import numpy as np
import pytest

from jaxllm.data.prompts import Prompt
from jaxllm.rewards.weighted import Rewards, WeightedReward
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.judging import Judge
from jaxllm.rollouts.responses import Response, bucket, rows_of


def asked(*ids):
    return Prompt(ids, [{"role": "user", "content": "?"}], {"answer": "4"})


def written(ids, ended=True):
    ids = tuple(ids)
    log_probs = tuple(-float(n) for n in range(len(ids)))
    return Response(ids, log_probs, (True,) * len(ids), "4", ended)


def test_a_row_has_a_prompt_and_what_the_policy_has_chosen():
    rows = rows_of([asked(1, 5, 6), asked(1)], [written([7, 8, 2]), written([9], False)], 8)
    np.testing.assert_array_equal(rows["tokens"][0], [1, 5, 6, 7, 8, 2, 0, 0])
    np.testing.assert_array_equal(rows["targets"][0], [5, 6, 7, 8, 2, 0, 0, 0])
    np.testing.assert_array_equal(rows["positions"][0], [0, 1, 2, 3, 4, 5, 0, 0])
    np.testing.assert_array_equal(rows["segment_ids"][0], [1, 1, 1, 1, 1, 1, 0, 0])
    # The first is chosen at the prompt's last token, what ends it too; then one state more.
    np.testing.assert_array_equal(rows["loss_weights"][0], [0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(rows["value_weights"][0], [0, 0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["sampler_log_probs"][0], [0, 0, 0, -1, -2, 0, 0, 0])
    np.testing.assert_array_equal(rows["loss_weights"][1], [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows["value_weights"][1], [1, 0, 0, 0, 0, 0, 0, 0])  # no end
    np.testing.assert_array_equal(rows["targets"][1], [9, 0, 0, 0, 0, 0, 0, 0])


def test_padding_is_told_by_length_and_not_by_its_token():
    """A token may be padding and end a response, or be chosen anywhere."""
    rows = rows_of([asked(1, 0), asked(1, 5)], [written([7, 0, 8, 0]), written([7, 6, 8, 2])], 8)
    np.testing.assert_array_equal(rows["tokens"][0], [1, 0, 7, 0, 8, 0, 0, 0])
    np.testing.assert_array_equal(rows["tokens"][1], [1, 5, 7, 6, 8, 2, 0, 0])
    for name in ("positions", "segment_ids", "loss_weights", "value_weights", "sampler_log_probs"):
        np.testing.assert_array_equal(*rows[name])


def test_what_a_tool_has_written_is_no_action():
    response = Response((7, 8, 9, 2), (-1.0, 0.0, 0.0, -2.0), (True, False, False, True), "", True)
    rows = rows_of([asked(1, 5)], [response], 8)
    np.testing.assert_array_equal(rows["tokens"][0], [1, 5, 7, 8, 9, 2, 0, 0])
    np.testing.assert_array_equal(rows["loss_weights"][0], [0, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(rows["value_weights"][0], [0, 1, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["sampler_log_probs"][0], [0, -1, 0, 0, -2, 0, 0, 0])


def test_few_lengths_hold_all_rows():
    lengths = {
        bucket(rows_of([asked(1)], [written(range(2, 2 + size))], 100)) for size in range(1, 99)
    }
    assert len(lengths) <= 8
    for size in range(1, 99):
        rows = rows_of([asked(1)], [written(range(2, 2 + size))], 100)
        assert size + 1 <= bucket(rows) <= 100


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, [3, 3]),
        ({"missing_end": "replace"}, [3, -1]),
        ({"missing_end": "replace", "missing_end_penalty": 2.0}, [3, -2]),
        ({"missing_end": "subtract", "missing_end_penalty": 0.5}, [3, 2.5]),
        # Of 10 tokens at most the last four cost a quarter each.
        ({"overlong_buffer": 4}, [2.75, 2]),
    ],
)
def test_a_response_that_does_not_end_is_worth_less(fields, wanted):
    rewards = Rewards((WeightedReward("three", lambda p, r, records: [3.0] * len(p)),))
    judge = Judge(RolloutConfig(**fields), rewards, 10)
    found = judge([asked(1)] * 2, [written(range(7)), written(range(10), ended=False)])
    np.testing.assert_allclose(found.scores, wanted)
    np.testing.assert_allclose(found.by_name["three"], [3, 3])
