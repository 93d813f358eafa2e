"""Fits find again the laws that runs were made by."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from jaxllm.scaling.fits import (
    Runs,
    _huber_loss,
    bootstrap,
    fit_parametric,
    frontier_through,
    interval,
    parabola_through,
)
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER, PARAMETRIC

LAW = PARAMETRIC["chinchilla"]


def made(noise, seed=0, sizes=12, budgets=8):
    """Runs of several sizes and budgets, whose losses are off by a share `noise`."""
    rng = np.random.default_rng(seed)
    parameters = np.repeat(np.geomspace(5e7, 1.6e10, sizes), budgets)
    flops = np.tile(np.geomspace(6e18, 3e21, budgets), sizes)
    tokens = flops / (FLOPS_PER_PARAMETER * parameters)
    losses = LAW.loss(parameters, tokens) * np.exp(noise * rng.normal(size=parameters.size))
    return Runs(parameters, tokens, losses)


@pytest.fixture(scope="module")
def fitted():
    runs = made(0.005)
    return runs, fit_parametric(runs)


def test_runs_without_noise_give_their_law_again():
    start = PARAMETRIC["besiroglu"]
    found = fit_parametric(made(0.0, sizes=6, budgets=5), start)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=1e-5), name


def test_the_grid_finds_it_through_noise(fitted):
    _, found = fitted
    assert found.alpha == pytest.approx(LAW.alpha, abs=0.01)
    assert found.beta == pytest.approx(LAW.beta, abs=0.01)


def test_how_sure_it_is(fitted):
    runs, found = fitted
    drawn = bootstrap(lambda sample: fit_parametric(sample, found), runs, 40, 0)
    for name in ("alpha", "beta"):
        low, high = interval([getattr(law, name) for law in drawn])
        assert low < getattr(LAW, name) < high
        assert 0.002 < high - low < 0.05


def test_the_gradient_of_the_loss():
    runs, rng = made(0.05), np.random.default_rng(1)
    sizes = np.log(runs.parameters) - 20, np.log(runs.tokens) - 24
    given = np.stack(sizes), np.log(runs.losses)
    for _ in range(3):
        theta = np.asarray([0.0, 0.0, 0.3, 0.3, 0.3]) + 0.1 * rng.normal(size=5)
        size = np.linalg.norm(_huber_loss(theta, *given)[1])
        error = check_grad(
            lambda t: _huber_loss(t, *given)[0], lambda t: _huber_loss(t, *given)[1], theta
        )
        assert error < 1e-4 * size


def test_parabolas_and_frontiers_are_exact_on_what_they_are_of():
    sizes = np.geomspace(1e6, 1e9, 7)
    losses = 2.5 + 0.07 * np.log(sizes / 3e7) ** 2
    found = parabola_through(sizes, losses)
    np.testing.assert_allclose(found, (3e7, 2.5, 0.07), rtol=1e-6)
    flops = np.geomspace(1e18, 1e22, 5)
    best = np.asarray([LAW.optimum(budget).parameters for budget in flops])
    frontier = frontier_through(flops, best, LAW.loss(best, flops / (FLOPS_PER_PARAMETER * best)))
    np.testing.assert_allclose(frontier.exponents, LAW.exponents, rtol=1e-9)
    np.testing.assert_allclose(frontier.optimum(1e24), LAW.optimum(1e24), rtol=1e-6)


def test_runs_are_drawn_within_their_groups():
    runs = made(0.0, sizes=4, budgets=3)
    budgets = np.round(np.log(runs.flops), 6)
    for sample in bootstrap(lambda drawn: drawn, runs, 5, 0, budgets):
        counts = np.unique(np.round(np.log(sample.flops), 6), return_counts=True)[1]
        np.testing.assert_array_equal(counts, 4)
    assert bootstrap(lambda drawn: drawn.losses.sum(), runs, 3, 1) == bootstrap(
        lambda drawn: drawn.losses.sum(), runs, 3, 1
    )
