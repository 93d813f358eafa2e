"""Scores of tasks as sigmoids of the loss."""

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.scaling.downstream import SigmoidLaw, fit_sigmoid


def test_a_sigmoid_is_found_again():
    law, losses = SigmoidLaw(0.25, 0.9, 3.0, 0.3), np.linspace(1.8, 5, 12)
    found = fit_sigmoid(losses, law.score(losses))
    for name in ("floor", "ceiling", "middle", "width"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.01), name


def test_scores_that_stay_where_they_are():
    found = fit_sigmoid(np.linspace(2, 3, 6), np.full(6, 0.25))
    np.testing.assert_allclose(found.score(np.linspace(2, 3, 20)), 0.25, atol=1e-3)


def test_all_or_nothing_looks_sudden_where_the_continuous_score_does_not():
    """Of answers of ten tokens: right in all of them, and log-probability."""
    losses = np.linspace(0.02, 2, 12)
    every = np.exp(-10 * losses)
    sudden, smooth = fit_sigmoid(losses, every), fit_sigmoid(losses, -10 * losses)
    assert sudden.width < 0.3 * smooth.width


def test_too_few_runs_are_told():
    with pytest.raises(UserError, match="a sigmoid needs 5 runs"):
        fit_sigmoid(np.asarray([1.0, 2, 3]), np.asarray([1.0, 2, 3]))
    with pytest.raises(UserError, match="there are 1"):
        fit_sigmoid(np.full(6, 2.0), np.linspace(0, 1, 6))
