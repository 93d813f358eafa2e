"""Scores of rewards: known answers."""

import numpy as np
import pytest

from jaxllm.evaluation.preferences import RatedRanking, calibration, preference_scores


def rated(source, scores, lengths, rewards):
    return RatedRanking(source, [float(score) for score in scores], lengths, rewards)


def test_each_ranking_counts_once():
    rankings = [
        # All three pairs are right.
        rated("a", [2, 1, 0], [1, 2, 3], [3.0, 2.0, 1.0]),
        # The only pair is wrong; the two that are as good are not compared.
        rated("b", [1, 0], [5, 4], [0.0, 1.0]),
        rated("b", [1, 1], [5, 4], [0.0, 1.0]),
        # A tie is half right, and of the same length.
        rated("b", [0, 1], [2, 2], [0.5, 0.5]),
    ]
    scores = preference_scores(rankings)
    assert scores["eval/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert scores["eval/longer_is_better"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert scores["eval/accuracy/better_is_longer"] == 0
    assert scores["eval/accuracy/better_is_shorter"] == 1
    assert scores["preference/a/accuracy"] == 1
    assert scores["preference/b/accuracy"] == pytest.approx(0.25)
    assert (scores["preference/a/rankings"], scores["preference/b/rankings"]) == (1, 3)
    assert scores["eval/rankings"] == 4


def test_what_length_explains():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, (200, 2))

    def explained(rewards):
        both = zip(lengths.tolist(), rewards.tolist(), strict=True)
        rankings = [rated("", [1, 0], length, reward) for length, reward in both]
        return preference_scores(rankings)["eval/explained_by_length"]

    assert explained(0.1 * lengths + 3) == pytest.approx(1)
    assert explained(-0.1 * lengths) == pytest.approx(1)  # that shorter is better, too
    noise = rng.normal(size=lengths.shape)
    assert explained(noise) < 0.05
    x, y = (
        (lengths[:, 0] - lengths[:, 1]).astype(float),
        noise[:, 0] - noise[:, 1] + 0.05 * (lengths[:, 0] - lengths[:, 1]),
    )
    residual = y - x * (x @ y) / (x @ x)
    expected = 1 - (residual @ residual) / (y @ y)
    assert explained(noise + 0.05 * lengths) == pytest.approx(expected)


def test_calibration():
    rng = np.random.default_rng(0)
    margins = rng.exponential(1.5, 20_000)
    right = rng.random(len(margins)) < 1 / (1 + np.exp(-margins))
    rankings = [
        rated("", [1, 0], [1, 1], [margin if good else -margin, 0.0])
        for margin, good in zip(margins.tolist(), right, strict=True)
    ]
    bins = calibration(rankings)
    assert sum(each["share"] for each in bins) == pytest.approx(1)
    assert all(0.5 <= each["predicted"] <= 1 for each in bins)
    assert preference_scores(rankings)["eval/calibration_error"] < 0.02
    sure = [rated("", [1, 0], [1, 1], [10 * r for r in each.rewards]) for each in rankings]
    assert preference_scores(sure)["eval/calibration_error"] > 0.2  # it claims too much


def test_without_a_pair_there_are_no_scores():
    assert preference_scores([rated("a", [1, 1], [1, 2], [0.0, 1.0])]) == {}
    assert calibration([]) == []
