"""Approaches 1 and 2 find again how N and D are best chosen."""

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.scaling.frontiers import (
    envelope,
    frontier_through,
    parabola_through,
    profiles,
    resampled_profiles,
    through_minima,
)
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER
from jaxllm.scaling.runs import runs_once


def test_parabolas_and_frontiers_are_exact_on_what_they_are_of(law):
    sizes = np.geomspace(1e6, 1e9, 7)
    losses = 2.5 + 0.07 * np.log(sizes / 3e7) ** 2
    found = parabola_through(sizes, losses)
    np.testing.assert_allclose(found, (3e7, 2.5, 0.07), rtol=1e-6)
    np.testing.assert_allclose(found.loss(sizes), losses)
    flops = np.geomspace(1e18, 1e22, 5)
    best = np.asarray([law.optimum(budget).parameters for budget in flops])
    frontier = frontier_through(flops, best, law.loss(best, flops / (FLOPS_PER_PARAMETER * best)))
    np.testing.assert_allclose(frontier.exponents, law.exponents, rtol=1e-9)
    np.testing.assert_allclose(frontier.optimum(1e24), law.optimum(1e24), rtol=1e-6)


def test_profiles_without_noise_give_the_exponent(isoflop_runs, law):
    found = through_minima(profiles(isoflop_runs(0.0)))
    assert found.exponent == pytest.approx(law.exponents[0], abs=1e-6)


def test_profiles_through_noise(isoflop_runs, law):
    found = through_minima(profiles(isoflop_runs(0.005)))
    assert found.exponent == pytest.approx(law.exponents[0], abs=0.01)


def test_the_envelope_through_noise(training_curves, law):
    exact = envelope(training_curves(0.0))
    assert exact.exponent == pytest.approx(law.exponents[0], abs=0.002)
    found = envelope(training_curves(0.005, points=400))
    assert found.exponent == pytest.approx(law.exponents[0], abs=0.01)
    # The budgets at which a size is best are those of the law, not of the fit alone.
    np.testing.assert_allclose(found.optimum(1e21), law.optimum(1e21), rtol=0.1)


def test_a_curve_that_ends_is_no_crossing(training_curves):
    """Of two runs the smaller is the best until it ends; nothing overtakes it."""
    small, large = training_curves(0.0, sizes=2)
    cut = small._replace(tokens=small.tokens[:40], losses=small.losses[:40])
    with pytest.raises(UserError, match="overtakes a smaller one, and there are 0"):
        envelope([cut, large])


def test_curves_of_too_few_points_are_told(training_curves):
    with pytest.raises(UserError, match="at least 5 points"):
        envelope(training_curves(0.0, points=3))
    with pytest.raises(UserError, match="at least 5 points"):
        envelope([])


def test_budgets_are_told_apart_though_runs_come_out_a_little_off(isoflop_runs):
    runs = isoflop_runs(0.0, budgets=4, sizes=6)
    rounded = runs._replace(tokens=runs.tokens * np.tile([1.0, 0.98, 1.01, 0.99, 1.0, 1.02], 4))
    assert [len(each.runs.losses) for each in profiles(rounded)] == [6] * 4


def test_a_profile_without_a_minimum_is_left_out(isoflop_runs):
    runs = isoflop_runs(0.0, budgets=3, sizes=7)
    one_sided = runs.chosen(np.asarray([0, 1, 2, *range(7, 21)]))
    found = profiles(one_sided)
    assert [each.has_minimum for each in found] == [False, True, True]
    assert len(through_minima(found).flops) == 2
    with pytest.raises(UserError, match="there are 1; give more sizes"):
        through_minima(found[:2])


def test_resampled_profiles_keep_their_sizes_and_scatter_as_much(isoflop_runs):
    noise = 0.005
    found = profiles(isoflop_runs(noise, budgets=2, sizes=6))
    rng = np.random.default_rng(0)
    drawn = [resampled_profiles(found, rng)[0] for _ in range(400)]
    np.testing.assert_array_equal(drawn[0].runs.parameters, found[0].runs.parameters)
    fitted = [each.parabola.loss(each.runs.parameters) for each in found]
    shares = [each.runs.losses / losses - 1 for each, losses in zip(found, fitted, strict=True)]
    spread = np.std([each.runs.losses / fitted[0] - 1 for each in drawn])
    # Three numbers of each parabola took their share of the scatter of six.
    assert spread == pytest.approx(np.sqrt(2) * np.std(shares), rel=0.1)


def test_three_sizes_do_not_tell_how_sure_a_parabola_is(isoflop_runs):
    found = profiles(isoflop_runs(0.005, budgets=3, sizes=3))
    through_minima(found)
    with pytest.raises(UserError, match="goes through three sizes exactly"):
        resampled_profiles(found, np.random.default_rng(0))


def test_a_parabola_of_a_line_has_no_minimum():
    sizes = np.geomspace(1e6, 1e8, 4)
    flat = runs_once(sizes, 1e18 / sizes, 5 - 0.1 * np.log(sizes))
    assert not profiles(flat)[0].has_minimum
