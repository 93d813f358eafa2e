"""Runs and curves made with known constants, and noise."""

import numpy as np
import pytest

from jaxllm.scaling.laws import FLOPS_PER_PARAMETER, PARAMETRIC
from jaxllm.scaling.runs import Curve, runs_once

LAW = PARAMETRIC["chinchilla"]


@pytest.fixture(scope="session")
def law():
    """What all are made by."""
    return LAW


@pytest.fixture(scope="session")
def grid_runs():
    """`make(noise, seed, sizes, budgets)`: all pairs of some sizes and budgets, losses off by a
    share `noise`."""

    def make(noise, seed=0, sizes=12, budgets=8):
        rng = np.random.default_rng(seed)
        parameters = np.repeat(np.geomspace(5e7, 1.6e10, sizes), budgets)
        flops = np.tile(np.geomspace(6e18, 3e21, budgets), sizes)
        return noisy(parameters, flops / (FLOPS_PER_PARAMETER * parameters), noise, rng)

    return make


@pytest.fixture(scope="session")
def isoflop_runs():
    """`make(noise, seed, budgets, sizes)`: of each budget sizes on both sides of the best."""

    def make(noise, seed=0, budgets=10, sizes=15):
        rng = np.random.default_rng(seed)
        flops = np.repeat(np.geomspace(1e17, 1e22, budgets), sizes)
        away = np.tile(np.exp(np.linspace(-2, 2, sizes)), budgets)
        parameters = LAW.optimum(flops).parameters * away
        return noisy(parameters, flops / (FLOPS_PER_PARAMETER * parameters), noise, rng)

    return make


@pytest.fixture(scope="session")
def training_curves():
    """`make(noise, seed, sizes, points)`: of each size a run from well before to well after the
    budget that it is best for."""

    def make(noise, seed=0, sizes=16, points=200):
        rng = np.random.default_rng(seed)
        made = []
        for size in np.geomspace(5e7, 1.6e10, sizes):
            best = LAW_TOKENS * size**LAW_POWER
            tokens = np.geomspace(best / 30, best * 30, points)
            runs = noisy(np.full(points, size), tokens, noise, rng)
            made.append(Curve(float(size), runs.tokens, runs.losses))
        return made

    return make


# The tokens that a size is best trained with: D of N_opt(C), C taken out.
_A, _B = LAW.exponents
LAW_POWER = _B / _A
LAW_TOKENS = float(LAW.optimum(6e20).tokens / LAW.optimum(6e20).parameters ** LAW_POWER)


def noisy(parameters, tokens, noise, rng):
    """Runs that the law is off by a share `noise` of."""
    losses = LAW.loss(parameters, tokens) * np.exp(noise * rng.normal(size=parameters.size))
    return runs_once(parameters, tokens, losses)
