"""The best of several responses, and what most of them say."""

import itertools

import numpy as np
import pytest

from jaxllm.rollouts.several import best_of, majority_of


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_best_is_the_mean_over_all_choices(count):
    scores = np.random.default_rng(0).integers(0, 4, (3, 5)).astype(float)
    wanted = np.mean(
        [[max(chosen) for chosen in itertools.combinations(row, count)] for row in scores]
    )
    assert best_of(scores, count) == pytest.approx(wanted)


def test_the_commonest_answer_counts():
    responses = [
        ["<think>1</think>#### 4", "it is #### 4", "\\boxed{5}"],
        ["yes", "no", "no  "],
        ["a", "b", "c"],
        # Numbers however they are written, and what has no answer says nothing.
        ["5", "so it is 4", "#### 4.0"],
        ["<think>a", "<think>b", "4"],
        ["<think>a", "<think>b", ""],
    ]
    scores = np.array([[1, 1, 0], [1, 0, 0], [0.5, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    wanted = [1, 0, 0.5, 1, 1, 0]
    for score, row, expected in zip(scores, responses, wanted, strict=True):
        assert majority_of(score[None], ["?"], [row]) == expected
    assert majority_of(scores, ["?"] * 6, responses) == pytest.approx(sum(wanted) / 6)
