"""Approach 3 of Hoffmann et al. 2022 (section 3.3 and D.2, https://arxiv.org/abs/2203.15556): the
loss L(N, D) = E + A/N^α + B/D^β, fitted to all runs at once; and the same for text that is read
several times (Muennighoff et al. 2023, section 3.1, https://arxiv.org/abs/2305.16264)."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from jaxllm.errors import UserError
from jaxllm.scaling.laws import ParametricLaw, RepeatingLaw
from jaxllm.scaling.runs import Runs

HUBER_DELTA = 1e-3
"""From which difference of log-losses on a run counts by its size rather than its square."""
LEAST_RUNS = 6
"""The law has five constants."""
LEAST_SIZES = 3
"""Of N and of D: through two goes every power law with a constant."""
MOST_TOGETHER = 0.995
"""Correlation of log N and log D, beyond which what each does cannot be told apart."""
NEVER_LESS = 1e9
"""`RepeatingLaw.of_parameters` where no run has more parameters than its text is best read by, so
that what more of them count is not known."""
_STARTS = 12
# A loss that rises with N or D is none; of exponents beyond, runs see a constant alone.
_LEAST_SLOPE = 1e-4
_COUNTS = (-5.0, float(np.log(NEVER_LESS)))
_BOUNDS: list[tuple[float | None, float | None]] = [(None, None)] * 3 + [(1e-3, 5.0)] * 2
ONCE = 1.01
"""Tokens for each different one, up to which a run counts as having read its text once."""


def fit_parametric(runs: Runs, start: ParametricLaw | None = None) -> ParametricLaw:
    """The law of least Σ Huber(log L - log L̂), by L-BFGS from the best of a grid of starts, of
    which the best end is taken (section D.2).

    Sizes are measured from their geometric mean while it searches, so that the terms and their
    exponents can be told apart.

    Args:
        runs: at least `LEAST_RUNS`.
        start: the one start to search from, as in a bootstrap; None: the grid.

    Raises:
        UserError: too few runs, sizes or numbers of tokens; N and D go together; or losses do not
            fall with both.
    """
    if start is None:
        _check_enough(runs)
    logs = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.losses)
    centres = logs[0].mean(), logs[1].mean()
    sizes = np.stack([logs[0] - centres[0], logs[1] - centres[1]])
    if start is None:
        # Most of the grid is far off, and what is near leads to the same.
        starts = sorted(_grid(runs.losses), key=lambda at: _huber_loss(at, sizes, logs[2])[0])
        starts = starts[:_STARTS]
    else:
        starts = [_searched(start, centres)]
    found = [
        minimize(
            _huber_loss,
            theta,
            (sizes, logs[2]),
            jac=True,
            method="L-BFGS-B",
            bounds=_BOUNDS,
            options={"maxiter": 1000, "maxfun": 1500, "ftol": 1e-13, "gtol": 1e-9},
        )
        for theta in starts
    ]
    best = min(found, key=lambda result: result.fun).x
    if start is None:
        _check_falls(best)
    return _unsearched(best, centres)


def _huber_loss(
    theta: Float64[np.ndarray, " 5"],
    sizes: Float64[np.ndarray, "2 runs"],
    log_losses: Float64[np.ndarray, " runs"],
) -> tuple[float, Float64[np.ndarray, " 5"]]:
    """The sum and its gradient by (log A, log B, log E, α, β), in units of δ²."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * sizes[0], b - beta * sizes[1], np.full_like(sizes[0], e)])
    of_runs, slope = _huber(logsumexp(terms, axis=0) - log_losses)
    of_terms = softmax(terms, axis=0) * slope / HUBER_DELTA
    gradient = [*of_terms.sum(1), *(-of_terms[:2] * sizes).sum(1)]
    return float(np.sum(of_runs)), np.asarray(gradient)


def _huber(
    differences: Float64[np.ndarray, " runs"],
) -> tuple[Float64[np.ndarray, " runs"], Float64[np.ndarray, " runs"]]:
    """Huber's loss in units of δ², and its slope by what is `differences` in units of δ."""
    apart = differences / HUBER_DELTA
    slope = np.clip(apart, -1, 1)
    return slope * (apart - 0.5 * slope), slope


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


def _unsearched(theta: Float64[np.ndarray, " 5"], centres: tuple[float, float]) -> ParametricLaw:
    a, b, e, alpha, beta = theta
    return ParametricLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * centres[0])),
        B=float(np.exp(b + beta * centres[1])),
        alpha=float(alpha),
        beta=float(beta),
    )


def _check_enough(runs: Runs) -> None:
    """Tells what there is too little of.

    Raises:
        UserError: there is.
    """
    for what, found, least in (
        ("runs", len(runs.losses), LEAST_RUNS),
        ("sizes (N)", _different(runs.parameters), LEAST_SIZES),
        ("numbers of tokens (D)", _different(runs.tokens), LEAST_SIZES),
    ):
        if found < least:
            raise UserError(
                f"approach 3 needs at least {least} {what}, and there are {found}: give more runs."
            )
    together = np.corrcoef(np.log(runs.parameters), np.log(runs.tokens))[0, 1]
    if abs(together) > MOST_TOGETHER:
        raise UserError(
            "approach 3 cannot tell N from D, as all runs have nearly the same of one for the "
            f"other (log N and log D correlate by {together:.4f}): give runs of several D of one N."
        )
    sizes = np.stack([np.log(runs.parameters), np.log(runs.tokens), np.ones_like(runs.losses)])
    slopes = np.linalg.lstsq(sizes.T, np.log(runs.losses), rcond=None)[0]
    for name, slope in zip(("N", "D"), slopes, strict=False):
        if slope > -_LEAST_SLOPE:
            raise _no_law(name)


def _check_falls(theta: Float64[np.ndarray, " 5"]) -> None:
    """Refuses a law that is none.

    Raises:
        UserError: an exponent is at its bound.
    """
    for name, value, (low, high) in zip(("N", "D"), theta[3:], _BOUNDS[3:], strict=True):
        assert low is not None and high is not None
        if not 1.01 * low < value < 0.99 * high:
            raise _no_law(name)


def _no_law(name: str) -> UserError:
    return UserError(
        f"approach 3 finds no law, as losses do not fall with {name} as powers do; give runs of a "
        "wider range, or less noise."
    )


def _different(values: Float64[np.ndarray, " runs"]) -> int:
    """How many of them differ by a hundredth or more."""
    return len(np.unique(np.round(np.log(values), 2)))


def fit_repeating(runs: Runs, start: RepeatingLaw | None = None) -> RepeatingLaw:
    """What repeated tokens and excess parameters count, and the law of what they count, by least
    Σ Huber(log L - log L̂) over all seven constants.

    Args:
        runs: some of which have read their text several times.
        start: where to search from, as in a bootstrap; None: the law of the runs that have read it
            once, and a grid.

    Raises:
        UserError: no run has read its text more than once, or too few have once.
    """
    if start is not None:
        return _fit_together(runs, start)
    once = runs.tokens <= ONCE * runs.unique
    if once.all():
        raise UserError(
            "config.scaling.repeated: no run has read its text more than once (unique_tokens below "
            "tokens); leave it False, or give such runs."
        )
    law = fit_parametric(runs.chosen(np.flatnonzero(once)))
    starts = (RepeatingLaw(law, *counts) for counts in itertools.product((3.0, 15.0), repeat=2))
    found = min((_fit_together(runs, each) for each in starts), key=lambda law: _loss(runs, law))
    wide = runs.parameters > found.law.optimum_of_tokens(runs.unique)
    return found if wide.any() else dataclasses.replace(found, of_parameters=NEVER_LESS)


def _fit_together(runs: Runs, start: RepeatingLaw) -> RepeatingLaw:
    """From one start."""
    logs = np.log(runs.parameters).mean(), np.log(runs.tokens).mean()

    def made(theta: Float64[np.ndarray, " 7"]) -> RepeatingLaw:
        of_tokens, of_parameters = np.exp(theta[5:]).tolist()
        return RepeatingLaw(_unsearched(theta[:5], logs), of_tokens, of_parameters)

    theta = np.asarray(
        [*_searched(start.law, logs), *np.log([start.of_tokens, start.of_parameters])]
    )
    found = minimize(
        lambda theta: _loss(runs, made(theta)),
        theta,
        jac="3-point",
        method="L-BFGS-B",
        options={"maxiter": 1000, "maxfun": 20000, "ftol": 1e-11},
        bounds=[*_BOUNDS, _COUNTS, _COUNTS],
    )
    return made(found.x)


def _loss(runs: Runs, law: RepeatingLaw) -> float:
    predicted = law.loss(runs.parameters, runs.tokens, runs.unique)
    return float(np.sum(_huber(np.log(predicted) - np.log(runs.losses))[0]))
