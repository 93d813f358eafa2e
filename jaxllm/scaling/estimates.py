"""What measured runs tell: laws by each approach, how sure they are, and what they predict."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.scaling.frontiers import (
    Frontier,
    envelope,
    profiles,
    resampled_profiles,
    through_minima,
)
from jaxllm.scaling.laws import Allocation, LossParts, ParametricLaw, RepeatingLaw
from jaxllm.scaling.measured import MeasuredRun, as_curves, as_runs
from jaxllm.scaling.parametric import NEVER_LESS, fit_parametric, fit_repeating
from jaxllm.scaling.runs import Runs, resampled, resampled_curves
from jaxllm.scaling.uncertainty import Interval, bootstrap, interval

APPROACHES = ("envelope", "isoflop", "parametric")
"""1, 2 and 3 of Hoffmann et al. 2022."""
CONSTANTS = ("E", "A", "B", "alpha", "beta")

Law = Frontier | ParametricLaw | RepeatingLaw


class Sureness(NamedTuple):
    """How intervals are made."""

    samples: int
    level: float
    seed: int


class Estimate(NamedTuple):
    """A law, and what resampled runs give in its place."""

    law: Law
    samples: Sequence[Law]
    level: float

    def interval(self, value: Callable[[Law], float]) -> Interval:
        """Of a number that a law gives."""
        return interval([value(law) for law in self.samples], self.level)


def estimate(
    approach: str, measured: Sequence[MeasuredRun], count: str, repeated: bool, sure: Sureness
) -> Estimate:
    """The law of an approach.

    Args:
        approach: one of `APPROACHES`.
        measured: the runs.
        count: which parameters N counts.
        repeated: whether `parametric` is to tell what repeated tokens count.
        sure: how its intervals are made.

    Raises:
        UserError: the approach wants other runs.
    """
    if approach == "envelope":
        return _sampled(envelope, as_curves(measured, count), resampled_curves, sure)
    runs = as_runs(measured, count)
    if approach == "isoflop":
        return _sampled(through_minima, profiles(runs), resampled_profiles, sure)
    if not repeated:
        law = fit_parametric(runs)
        return _sampled(lambda sample: fit_parametric(sample, law), runs, resampled, sure, law)
    found = fit_repeating(runs)
    return _sampled(lambda sample: fit_repeating(sample, found), runs, resampled, sure, found)


def _sampled(
    fit: Callable[[Any], Law],
    data: Any,
    resample: Callable[[Any, np.random.Generator], Any],
    sure: Sureness,
    law: Law | None = None,
) -> Estimate:
    """A fit and those of resampled data, which begin from its `law`."""
    found = fit(data) if law is None else law
    samples = bootstrap(fit, lambda rng: resample(data, rng), sure.samples, sure.seed)
    return Estimate(found, samples, sure.level)


def optimum(law: Law, flops: float, unique: float) -> Allocation:
    """The best N and D of a budget.

    Args:
        law: by any approach.
        flops: C.
        unique: how many different tokens there are; ∞: enough. Only a `RepeatingLaw` heeds it.
    """
    return law.optimum(flops, unique) if isinstance(law, RepeatingLaw) else law.optimum(flops)


def parts(law: Law, at: Allocation, unique: float) -> LossParts:
    """What a loss is made of, by a law of the loss."""
    assert not isinstance(law, Frontier)
    if isinstance(law, RepeatingLaw):
        return law.parts(at.parameters, at.tokens, np.minimum(unique, at.tokens))
    return law.parts(at.parameters, at.tokens)


def loss(law: Law, at: Allocation, unique: float) -> float:
    """What N parameters come to with D tokens, by a law of the loss."""
    return float(sum(parts(law, at, unique)))


# -- As scores


def law_scores(
    found: Mapping[str, Estimate], prefix: str = "scaling/"
) -> Iterator[tuple[str, float]]:
    """Constants of the parametric law and exponents by each approach, with their intervals."""
    for approach, estimated in found.items():
        for place, name in enumerate("ab"):
            yield from _with_interval(
                f"{prefix}{approach}/{name}", estimated, lambda law, at=place: law.exponents[at]
            )
        if isinstance(estimated.law, Frontier):
            continue
        for name in constants(estimated.law):
            yield from _with_interval(
                f"{prefix}{name}",
                estimated,
                lambda law, at=name: constants(law).get(at, NEVER_LESS),
                "/",
            )


def _with_interval(
    name: str, estimated: Estimate, value: Callable[..., float], between: str = "_"
) -> Iterator[tuple[str, float]]:
    yield name, value(estimated.law)
    low, high = estimated.interval(value)
    yield f"{name}{between}low", low
    yield f"{name}{between}high", high


def constants(law: Law) -> dict[str, float]:
    """Of the parametric law, and of a repeating one those of repeating."""
    if isinstance(law, RepeatingLaw):
        beside = {"of_tokens": law.of_tokens}
        if law.of_parameters < NEVER_LESS:
            beside["of_parameters"] = law.of_parameters
        return constants(law.law) | beside
    return {name: getattr(law, name) for name in CONSTANTS}


def budget_scores(
    budget: float, found: Mapping[str, Estimate], unique: float
) -> Iterator[tuple[str, float]]:
    """What each approach would spend a budget on, what comes of that, and what doubling N, D or
    both would take off the loss."""
    for approach, estimated in found.items():
        prefix = f"scaling/budget/{budget:g} {approach}/"
        best = optimum(estimated.law, budget, unique)
        yield from _with_interval(
            f"{prefix}parameters",
            estimated,
            lambda law: float(optimum(law, budget, unique).parameters),
        )
        yield f"{prefix}tokens", float(best.tokens)
        yield f"{prefix}tokens_per_parameter", float(best.tokens_per_parameter)
        if isinstance(estimated.law, Frontier):
            continue
        yield from _with_interval(
            f"{prefix}loss", estimated, lambda law, at=best: loss(law, at, unique)
        )
        for name, part in zip(LossParts._fields, parts(estimated.law, best, unique), strict=True):
            yield f"{prefix}loss_{name}", float(part)
        reached = loss(estimated.law, best, unique)
        for name, n, d in (("parameters", 2, 1), ("tokens", 1, 2), ("both", 2, 2)):
            more = Allocation(n * best.parameters, d * best.tokens)
            yield f"{prefix}doubling_{name}", reached - loss(estimated.law, more, unique)


def held_out_scores(
    held_out: Sequence[MeasuredRun], estimated: Estimate, count: str
) -> Iterator[tuple[str, float]]:
    """What the law of other runs says of these, beside what they came to."""
    for run in held_out:
        prefix = f"scaling/held_out/{run.name}/"
        size = run.counted(count)
        at = Allocation(size, run.tokens)
        yield f"{prefix}parameters", size
        yield f"{prefix}tokens", run.tokens
        yield f"{prefix}measured", run.loss
        yield from _with_interval(
            f"{prefix}predicted", estimated, lambda law, at=at, run=run: loss(law, at, run.unique)
        )
        yield f"{prefix}error", loss(estimated.law, at, run.unique) / run.loss - 1


def predictions(runs: Runs, law: Law) -> list[float]:
    """Losses of runs by a law of the loss."""
    return [
        loss(law, Allocation(size, tokens), unique)
        for size, tokens, unique in zip(runs.parameters, runs.tokens, runs.unique, strict=True)
    ]


def residual(runs: Runs, law: Law) -> float:
    """Root mean square of log L - log L̂: the share by which the law is off."""
    return float(np.sqrt(np.mean((np.log(predictions(runs, law)) - np.log(runs.losses)) ** 2)))
