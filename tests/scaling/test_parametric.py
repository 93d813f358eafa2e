"""Approach 3 finds again the law that runs were made by."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import check_grad

from jaxllm.errors import UserError
from jaxllm.scaling.laws import PARAMETRIC, REPEATING
from jaxllm.scaling.parametric import NEVER_LESS, _huber_loss, fit_parametric, fit_repeating
from jaxllm.scaling.runs import Runs, resampled, runs_once
from jaxllm.scaling.uncertainty import bootstrap, interval


@pytest.fixture(scope="module")
def fitted(grid_runs):
    runs = grid_runs(0.005)
    return runs, fit_parametric(runs)


def test_runs_without_noise_give_their_law_again(grid_runs, law):
    found = fit_parametric(grid_runs(0.0, sizes=6, budgets=5), PARAMETRIC["besiroglu"])
    for name, value in dataclasses.asdict(law).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name


def test_the_grid_finds_it_through_noise(fitted, law):
    _, found = fitted
    assert found.alpha == pytest.approx(law.alpha, abs=0.01)
    assert found.beta == pytest.approx(law.beta, abs=0.01)


def test_how_sure_it_is(fitted, law):
    runs, found = fitted
    drawn = bootstrap(
        lambda sample: fit_parametric(sample, found), lambda rng: resampled(runs, rng), 40, 0
    )
    for name in ("alpha", "beta"):
        low, high = interval([getattr(each, name) for each in drawn])
        assert low < getattr(law, name) < high
        assert 0.002 < high - low < 0.05


def test_one_run_that_went_wrong_moves_it_little(grid_runs, law):
    runs = grid_runs(0.0, sizes=6, budgets=5)
    losses = runs.losses.copy()
    losses[7] *= 1.2
    found = fit_parametric(runs._replace(losses=losses), law)
    assert found.alpha == pytest.approx(law.alpha, abs=0.005)


def test_the_gradient_of_the_loss(grid_runs):
    runs, rng = grid_runs(0.05), np.random.default_rng(1)
    sizes = np.log(runs.parameters) - 20, np.log(runs.tokens) - 24
    given = np.stack(sizes), np.log(runs.losses)
    for _ in range(3):
        theta = np.asarray([0.0, 0.0, 0.3, 0.3, 0.3]) + 0.1 * rng.normal(size=5)
        size = np.linalg.norm(_huber_loss(theta, *given)[1])
        error = check_grad(
            lambda t: _huber_loss(t, *given)[0], lambda t: _huber_loss(t, *given)[1], theta
        )
        assert error < 1e-4 * size


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda runs: runs.chosen(np.arange(5)), "at least 6 runs, and there are 5"),
        (
            lambda runs: runs._replace(parameters=np.full(30, 1e8)),
            r"3 sizes \(N\), and there are 1",
        ),
        (lambda runs: runs._replace(tokens=np.full(30, 1e9)), r"numbers of tokens \(D\)"),
    ],
)
def test_too_little_to_fit_is_told(grid_runs, change, told):
    with pytest.raises(UserError, match=told):
        fit_parametric(change(grid_runs(0.0, sizes=6, budgets=5)))


def test_tokens_in_step_with_parameters_are_told(law):
    sizes = np.geomspace(1e7, 1e9, 8)
    with pytest.raises(UserError, match=r"cannot tell N from D.* correlate by 1\.0000"):
        fit_parametric(runs_once(sizes, 20 * sizes, law.loss(sizes, 20 * sizes)))


@pytest.mark.parametrize(
    "losses",
    [np.full(30, 3.0), 3 + np.random.default_rng(0).random(30), np.linspace(2, 3, 30)],
    ids=["all the same", "at random", "rising with N"],
)
def test_losses_that_do_not_fall_are_told(grid_runs, losses):
    with pytest.raises(UserError, match="finds no law, as losses do not fall with"):
        fit_parametric(grid_runs(0.0, sizes=6, budgets=5)._replace(losses=losses))


@pytest.fixture(scope="module")
def repeated_runs():
    """Runs of up to 90 epochs, and of far more parameters than their text is best read by."""
    made = REPEATING["muennighoff"]
    parameters = np.repeat(np.geomspace(1e7, 8e9, 8), 10)
    tokens = np.tile(np.geomspace(1e9, 9e11, 10), 8)
    unique = np.minimum(tokens, 1e10)
    return made, Runs(parameters, tokens, unique, made.loss(parameters, tokens, unique))


def test_what_repeated_tokens_count_is_found_again(repeated_runs):
    made, runs = repeated_runs
    start = dataclasses.replace(made, of_tokens=5.0, of_parameters=15.0)
    found = fit_repeating(runs, start)
    assert found.of_tokens == pytest.approx(made.of_tokens, rel=0.01)
    assert found.of_parameters == pytest.approx(made.of_parameters, rel=0.01)
    assert found.law.alpha == pytest.approx(made.law.alpha, abs=0.002)


def test_where_no_model_is_too_large_its_parameters_all_count(repeated_runs):
    made, runs = repeated_runs
    small = runs.parameters < made.law.optimum_of_tokens(runs.unique)
    found = fit_repeating(runs.chosen(np.flatnonzero(small)))
    assert found.of_parameters == NEVER_LESS
    assert found.of_tokens == pytest.approx(made.of_tokens, rel=0.1)


def test_a_law_of_repeating_wants_runs_that_repeat(grid_runs):
    with pytest.raises(UserError, match="no run has read its text more than once"):
        fit_repeating(grid_runs(0.0))
