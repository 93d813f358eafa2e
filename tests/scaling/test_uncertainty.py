"""Intervals of what resampled data gives."""

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.scaling.uncertainty import bootstrap, interval


def test_an_interval_leaves_out_as_much_on_both_sides():
    low, high = interval([float(value) for value in range(101)], 0.9)
    assert (low, high) == pytest.approx((5.0, 95.0))


def test_the_mean_of_normal_numbers_is_as_sure_as_is_known():
    data = np.random.default_rng(0).normal(size=100)
    drawn = bootstrap(np.mean, lambda rng: rng.choice(data, 100), 1000, 0)
    low, high = interval(drawn)
    assert high - low == pytest.approx(2 * 1.645 * data.std() / 10, rel=0.1)


def test_the_same_seed_draws_the_same():
    def drawn(seed):
        return bootstrap(float, lambda rng: rng.random(), 5, seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_samples_without_a_fit_are_left_out_if_they_are_few():
    def fit(value):
        if value < share:
            raise UserError("there is none.")
        return value

    share = 0.1
    kept = bootstrap(fit, lambda rng: rng.random(), 100, 0)
    assert 80 < len(kept) < 100
    assert min(kept) >= share
    share = 0.5
    with pytest.raises(UserError, match=r"of 100 samples of the runs have none \(there is none\)"):
        bootstrap(fit, lambda rng: rng.random(), 100, 0)
