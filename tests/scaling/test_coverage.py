"""Every approach, a hundred times: its 90 % intervals hold the truth in about 90."""

import numpy as np
import pytest

from jaxllm.scaling.frontiers import envelope, profiles, resampled_profiles, through_minima
from jaxllm.scaling.parametric import fit_parametric
from jaxllm.scaling.runs import resampled, resampled_curves
from jaxllm.scaling.uncertainty import bootstrap, interval

NOISE, SAMPLES, TIMES = 0.005, 200, 100


def covered(make, fit, resample, values):
    """Of each value how often its interval holds the truth, and how far off the estimates are."""
    hits, apart = np.zeros(len(values), int), []
    for seed in range(TIMES):
        data = make(seed)
        found = fit(data, None)
        drawn = bootstrap(
            lambda sample, found=found: fit(sample, found),
            lambda rng, data=data: resample(data, rng),
            SAMPLES,
            seed,
        )
        for place, (value, truth) in enumerate(values):
            low, high = interval([value(law) for law in drawn])
            hits[place] += low <= truth <= high
        apart.append([value(found) - truth for value, truth in values])
    return hits, np.abs(np.asarray(apart))


@pytest.mark.slow
def test_envelopes(training_curves, law):
    hits, apart = covered(
        lambda seed: training_curves(NOISE, seed, points=400),
        lambda curves, _: envelope(curves),
        resampled_curves,
        [(lambda frontier: frontier.exponent, law.exponents[0])],
    )
    check("envelope", hits, apart)


@pytest.mark.slow
def test_profiles(isoflop_runs, law):
    hits, apart = covered(
        lambda seed: profiles(isoflop_runs(NOISE, seed)),
        lambda found, _: through_minima(found),
        resampled_profiles,
        [(lambda frontier: frontier.exponent, law.exponents[0])],
    )
    check("isoflop", hits, apart)


@pytest.mark.slow
def test_parametric_laws(grid_runs, law):
    hits, apart = covered(
        lambda seed: grid_runs(NOISE, seed, sizes=20, budgets=20),  # 400, as Hoffmann et al. had
        # The true law is where to search from: what the grid of starts finds is tested elsewhere.
        lambda runs, found: fit_parametric(runs, found or law),
        resampled,
        [
            (lambda fitted: fitted.alpha, law.alpha),
            (lambda fitted: fitted.beta, law.beta),
            (lambda fitted: fitted.exponents[0], law.exponents[0]),
        ],
    )
    check("parametric", hits, apart)


def check(name, hits, apart):
    """90 of 100, as far as that can be told from 100; and exponents within 0.01 as a rule."""
    print(f"{name}: covered {hits}, off by {apart.mean(0)}, at most {apart.max(0)}")
    assert (hits >= 83).all()
    assert (hits <= 97).all()
    assert (np.mean(apart < 0.01, axis=0) >= 0.9).all()
