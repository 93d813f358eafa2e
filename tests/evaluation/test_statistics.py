"""Standard errors against their formulas and against repetition."""

import math

import numpy as np
import pytest

from jaxllm.evaluation.statistics import mean, paired_difference, ratio, standard_error


def test_of_right_and_wrong_it_is_the_binomial_one():
    values = [1.0] * 30 + [0.0] * 70
    assert mean(values) == pytest.approx(0.3)
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_it_is_how_much_the_mean_varies_from_sample_to_sample():
    rng = np.random.default_rng(0)
    samples = (rng.random((4000, 50)) < 0.2).astype(float)
    expected = samples.mean(axis=1).std()
    assert np.mean([standard_error(list(map(float, s))) for s in samples]) == pytest.approx(
        expected, rel=0.05
    )


def test_of_one_item_there_is_none():
    assert math.isnan(standard_error([1.0]))


def test_a_ratio_of_sums_varies_from_sample_to_sample_as_told():
    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 4, size=(3000, 80)).astype(float)
    parts = wholes * (rng.random((3000, 80)) < 0.3)  # all parts of an item together
    found = [ratio([*map(float, p)], [*map(float, w)]) for p, w in zip(parts, wholes, strict=True)]
    ratios, errors = zip(*found, strict=True)
    assert np.mean(ratios) == pytest.approx(0.3, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_a_ratio_to_ones_is_a_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    expected = (mean(values), standard_error(values))
    assert ratio(values, [1.0] * 5) == pytest.approx(expected)


def test_a_paired_difference_knows_that_items_are_hard_or_easy_for_both():
    rng = np.random.default_rng(0)
    hard = rng.random(1000)
    one, other = ([float(x > limit) for x in hard] for limit in (0.5, 0.6))
    difference, error = paired_difference(one, other)
    assert difference == pytest.approx(0.1, abs=0.03)
    assert error == standard_error([a - b for a, b in zip(one, other, strict=True)])
    apart = math.hypot(standard_error(one), standard_error(other))
    assert error < 0.5 * apart
    assert paired_difference(one, one) == (0, 0)
