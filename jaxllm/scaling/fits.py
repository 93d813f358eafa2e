"""Laws out of runs: the three approaches of Hoffmann et al. 2022 (section 3,
https://arxiv.org/abs/2203.15556), and how sure they are.

1. The envelope of training curves: for each budget the run that has the least loss by then.
2. IsoFLOP profiles: for each budget a parabola through the losses of several sizes.
3. The parametric loss L(N, D) = E + A/N^α + B/D^β, fitted to all runs at once.

The first two give how N and D are best chosen for a budget, N ∝ C^a and D ∝ C^b; the third a law
from which that follows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64, Int
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from jaxllm.scaling.laws import FLOPS_PER_PARAMETER, Allocation, ParametricLaw

HUBER_DELTA = 1e-3
"""From which difference of log-losses on a run counts by its size rather than its square."""

T = TypeVar("T")


class Runs(NamedTuple):
    """Runs by what they spent and came to; float64."""

    parameters: Float64[np.ndarray, " runs"]
    tokens: Float64[np.ndarray, " runs"]
    losses: Float64[np.ndarray, " runs"]
    """In nats a token, held out."""

    @property
    def flops(self) -> Float64[np.ndarray, " runs"]:
        """C = 6 N D."""
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens

    def chosen(self, index: Int[np.ndarray, " chosen"]) -> "Runs":
        """Some of them, with repeats."""
        return Runs(*(array[index] for array in self))


# -- Approach 3


def fit_parametric(runs: Runs, start: ParametricLaw | None = None) -> ParametricLaw:
    """The law of least Σ Huber(log L - log L̂), by L-BFGS from a grid of starts, of which the best
    is taken (section D.2).

    Sizes are measured from their geometric mean while it searches, so that the terms and their
    exponents can be told apart.

    Args:
        runs: at least five.
        start: the one start to search from; None: the grid.
    """
    logs = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.losses)
    centres = logs[0].mean(), logs[1].mean()
    sizes = np.stack([logs[0] - centres[0], logs[1] - centres[1]])
    starts = _grid(runs.losses) if start is None else [_searched(start, centres)]
    found = [
        minimize(
            _huber_loss,
            theta,
            (sizes, logs[2]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9},
        )
        for theta in starts
    ]
    a, b, e, alpha, beta = min(found, key=lambda result: result.fun).x
    return ParametricLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * centres[0])),
        B=float(np.exp(b + beta * centres[1])),
        alpha=float(alpha),
        beta=float(beta),
    )


def _huber_loss(
    theta: Float64[np.ndarray, " 5"],
    sizes: Float64[np.ndarray, "2 runs"],
    log_losses: Float64[np.ndarray, " runs"],
) -> tuple[float, Float64[np.ndarray, " 5"]]:
    """The sum and its gradient by (log A, log B, log E, α, β), in units of δ²."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * sizes[0], b - beta * sizes[1], np.full_like(sizes[0], e)])
    apart = (logsumexp(terms, axis=0) - log_losses) / HUBER_DELTA
    slope = np.clip(apart, -1, 1)
    total = np.sum(slope * (apart - 0.5 * slope))
    of_terms = softmax(terms, axis=0) * slope / HUBER_DELTA
    gradient = [*of_terms.sum(1), *(-of_terms[:2] * sizes).sum(1)]
    return float(total), np.asarray(gradient)


def _grid(losses: Float64[np.ndarray, " runs"]) -> list[Float64[np.ndarray, " 5"]]:
    """Starts: how much of the least loss is irreducible, how the rest of the mean is divided, and
    both exponents."""
    starts = []
    for share, of_model, alpha, beta in itertools.product(
        (0.3, 0.6, 0.9), (0.2, 0.5, 0.8), (0.1, 0.3, 0.6, 1.0), (0.1, 0.3, 0.6, 1.0)
    ):
        irreducible = share * losses.min()
        rest = losses.mean() - irreducible
        parts = np.log([of_model * rest, (1 - of_model) * rest, irreducible])
        starts.append(np.asarray([*parts, alpha, beta]))
    return starts


def _searched(law: ParametricLaw, centres: tuple[float, float]) -> Float64[np.ndarray, " 5"]:
    a, b = np.log(law.A) - law.alpha * centres[0], np.log(law.B) - law.beta * centres[1]
    return np.asarray([a, b, np.log(law.E), law.alpha, law.beta])


# -- Approaches 1 and 2


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


class Parabola(NamedTuple):
    """L = least + curvature · (log N - log best)²."""

    best: float
    least: float
    curvature: float


def parabola_through(
    parameters: Float64[np.ndarray, " runs"], losses: Float64[np.ndarray, " runs"]
) -> Parabola:
    """Of least squares; its curvature may be negative, and there is no best size then."""
    logs = np.log(parameters)
    centre = logs.mean()
    curvature, slope, least = np.polyfit(logs - centre, losses, 2)
    middle = -slope / (2 * curvature)
    return Parabola(float(np.exp(centre + middle)), least + slope * middle / 2, curvature)


# -- How sure


class Interval(NamedTuple):
    """The middle part of what resampled runs give."""

    low: float
    high: float


def interval(values: Sequence[float], level: float = 0.9) -> Interval:
    """The percentiles that leave out as much on both sides."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def bootstrap(
    fit: Callable[[Runs], T], runs: Runs, count: int, seed: int, groups: np.ndarray | None = None
) -> list[T]:
    """Fits of runs drawn with replacement, as many as there are, within each group.

    Args:
        fit: of runs.
        runs: all.
        count: how often.
        seed: of the draws.
        groups: of each run, such as its budget; None: there is one.
    """
    rng = np.random.default_rng(seed)
    groups = np.zeros(len(runs.losses), int) if groups is None else groups
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = (
        np.concatenate([rng.choice(each, len(each)) for each in members]) for _ in range(count)
    )
    return [fit(runs.chosen(index)) for index in drawn]
