"""Approaches 1 and 2 of Hoffmann et al. 2022 (sections 3.1 and 3.2,
https://arxiv.org/abs/2203.15556): for each of several budgets the best size, and a power law
through them.

1. The envelope of training curves: for each budget the run that has the least loss by then.
2. IsoFLOP profiles: for each budget a parabola through the losses of several sizes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxllm.errors import UserError
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER, Allocation
from jaxllm.scaling.runs import Curve, Runs

LEAST_BUDGETS = 2
"""Through one point goes no line."""
LEAST_SIZES = 3
"""Of a budget, for a parabola."""
SAME_BUDGET = 0.05
"""Share by which the FLOPs of runs of one budget may differ."""
SMOOTHED_SHARE = 0.01
"""Of a run, what is left out of its curve: it falls too fast to be smoothed with the rest."""
_DEGREE = 3
_STEPS = 2000


@dataclasses.dataclass(frozen=True)
class Frontier:
    """How N and D are best chosen: N = k C^a, and D = C / (6 N)."""

    scale: float
    """k."""
    exponent: float
    """a."""
    flops: Float64[np.ndarray, " budgets"]
    parameters: Float64[np.ndarray, " budgets"]
    """The best N of each budget that it was fitted to."""
    losses: Float64[np.ndarray, " budgets"]
    """What they come to."""

    @property
    def exponents(self) -> tuple[float, float]:
        """a, and b = 1 - a."""
        return self.exponent, 1 - self.exponent

    def optimum(self, flops: float) -> Allocation:
        """The N and D of a budget."""
        parameters = self.scale * flops**self.exponent
        return Allocation(parameters, flops / (FLOPS_PER_PARAMETER * parameters))


def frontier_through(
    flops: Float64[np.ndarray, " budgets"],
    parameters: Float64[np.ndarray, " budgets"],
    losses: Float64[np.ndarray, " budgets"],
) -> Frontier:
    """The power law of least squares of log N by log C."""
    exponent, intercept = np.polyfit(np.log(flops), np.log(parameters), 1)
    return Frontier(float(np.exp(intercept)), float(exponent), flops, parameters, losses)


# -- Approach 1


def envelope(curves: Sequence[Curve]) -> Frontier:
    """The power law through the budgets at which a larger model overtakes a smaller one.

    Curves are smoothed (losses as polynomials of log D), as what is least of noisy ones would
    depend on their noise. Where the curves of N and M cross, each the least of all until then or
    from then on, the best size is taken to be √(N M): between two such budgets the least curve is
    one and the same, however the best size moves.

    Args:
        curves: one or more of each size.

    Raises:
        UserError: fewer than two crossings.
    """
    smooth = [_smoothed(curve) for curve in curves if len(curve.losses) > _DEGREE + 1]
    if not smooth:
        raise UserError(f"approach 1 needs curves of at least {_DEGREE + 2} points.")
    budgets = np.linspace(
        min(each.begin for each in smooth), max(each.end for each in smooth), _STEPS
    )
    losses = np.stack([each.losses(budgets) for each in smooth])
    least = np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0)
    found = []
    for at in np.flatnonzero(least[1:] != least[:-1]):
        pair = least[[at, at + 1]]
        apart = losses[pair[1], [at, at + 1]] - losses[pair[0], [at, at + 1]]
        larger = smooth[pair[1]].parameters > smooth[pair[0]].parameters
        # Where a curve begins or ends, another is the least without a crossing.
        if larger and np.isfinite(apart).all():
            part = apart[0] / (apart[0] - apart[1])
            budget = budgets[at] + part * (budgets[at + 1] - budgets[at])
            size = np.sqrt(smooth[pair[0]].parameters * smooth[pair[1]].parameters)
            found.append((np.exp(budget), size, losses[pair[0], at]))
    if len(found) < LEAST_BUDGETS:
        raise UserError(
            f"approach 1 needs budgets at which a larger model overtakes a smaller one, and there "
            f"are {len(found)} of them; give runs of more sizes, or longer ones."
        )
    return frontier_through(*np.asarray(found).T)


@dataclasses.dataclass(frozen=True)
class _Smoothed:
    """A curve by log C."""

    parameters: float
    begin: float
    end: float
    polynomial: np.polynomial.Polynomial

    def losses(self, budgets: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """NaN where it does not reach."""
        inside = (budgets >= self.begin) & (budgets <= self.end)
        return np.where(inside, self.polynomial(budgets), np.nan)


def _smoothed(curve: Curve) -> _Smoothed:
    kept = curve.tokens >= SMOOTHED_SHARE * curve.tokens[-1]
    budgets = np.log(FLOPS_PER_PARAMETER * curve.parameters * curve.tokens[kept])
    polynomial = np.polynomial.Polynomial.fit(budgets, curve.losses[kept], _DEGREE)
    return _Smoothed(curve.parameters, budgets[0], budgets[-1], polynomial)


# -- Approach 2


class Parabola(NamedTuple):
    """L = least + curvature · (log N - log best)²."""

    best: float
    least: float
    curvature: float

    def loss(self, parameters: float | np.ndarray) -> float | np.ndarray:
        """L(N)."""
        return self.least + self.curvature * np.log(parameters / self.best) ** 2


class Profile(NamedTuple):
    """Runs of one budget."""

    flops: float
    runs: Runs
    parabola: Parabola

    @property
    def has_minimum(self) -> bool:
        """Whether the parabola's least loss is a minimum, and lies among the sizes."""
        sizes, best = self.runs.parameters, self.parabola.best
        return self.parabola.curvature > 0 and bool(sizes.min() <= best <= sizes.max())


def parabola_through(
    parameters: Float64[np.ndarray, " runs"], losses: Float64[np.ndarray, " runs"]
) -> Parabola:
    """Of least squares; its curvature may be negative, and there is no best size then."""
    logs = np.log(parameters)
    centre = logs.mean()
    curvature, slope, least = np.polyfit(logs - centre, losses, 2)
    middle = -slope / (2 * curvature)
    # Where the curve is nearly a line its vertex is beyond all numbers.
    best = float(np.exp(np.clip(centre + middle, -700, 700)))
    return Parabola(best, float(least + slope * middle / 2), float(curvature))


def by_budget(flops: Float64[np.ndarray, " runs"]) -> list[list[int]]:
    """The runs of each budget, from the smallest on: each of about as many FLOPs as the first."""
    groups: list[list[int]] = []
    for index in np.argsort(flops, kind="stable").tolist():
        if not groups or flops[index] > (1 + SAME_BUDGET) * flops[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups


def profiles(runs: Runs) -> list[Profile]:
    """The runs by budget, from the smallest on, those of fewer than three sizes left out."""
    of_budget = [runs.chosen(np.asarray(group)) for group in by_budget(runs.flops)]
    return [
        Profile(
            float(np.exp(np.log(each.flops).mean())),
            each,
            parabola_through(each.parameters, each.losses),
        )
        for each in of_budget
        if len(np.unique(each.parameters)) >= LEAST_SIZES
    ]


def through_minima(found: Sequence[Profile]) -> Frontier:
    """The power law through the minima of profiles, those without one left out.

    A profile of the parametric law has the same shape at every budget, but for its height and place
    along log N; so sizes that lie alike around each best one shift all of them by the same factor,
    and leave the exponent as it is.

    Raises:
        UserError: fewer than two have a minimum.
    """
    kept = [profile for profile in found if profile.has_minimum]
    if len(kept) < LEAST_BUDGETS:
        raise UserError(
            f"approach 2 needs {LEAST_BUDGETS} budgets, each of {LEAST_SIZES} sizes or more with "
            f"the best one among them, and there are {len(kept)}; give more sizes, smaller or "
            "larger ones, for the same FLOPs."
        )
    minima = [(each.flops, each.parabola.best, each.parabola.least) for each in kept]
    return frontier_through(*np.asarray(minima).T)


def resampled_profiles(found: Sequence[Profile], rng: np.random.Generator) -> list[Profile]:
    """The same sizes, with losses as their parabola has it but for a share, drawn with replacement
    from the shares by which runs of all budgets are off it, larger by √(n/(n-3p)) for the three
    numbers that each of p parabolas took from n runs.

    Runs drawn themselves would leave too few sizes for a parabola, and of a few sizes alone
    residuals are too few.
    """
    fitted = [np.asarray(each.parabola.loss(each.runs.parameters)) for each in found]
    residuals = np.concatenate(
        [each.runs.losses / losses - 1 for each, losses in zip(found, fitted, strict=True)]
    )
    left = len(residuals) - 3 * len(found)
    if left < 1:
        raise UserError(
            "approach 2 cannot tell how sure it is, as a parabola goes through three sizes "
            "exactly: give a budget more sizes."
        )
    scale = np.sqrt(len(residuals) / left)
    drawn = []
    for (flops, runs, _), losses in zip(found, fitted, strict=True):
        again = losses * (1 + scale * rng.choice(residuals, len(losses)))
        parabola = parabola_through(runs.parameters, again)
        drawn.append(Profile(flops, runs._replace(losses=again), parabola))
    return drawn
