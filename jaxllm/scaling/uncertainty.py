"""How sure a fit is: what it gives for resampled data (Efron & Tibshirani 1993, chapter 13)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

S = TypeVar("S")
T = TypeVar("T")

LEVEL = 0.9
"""The part of what resampled data gives that an interval holds."""


class Interval(NamedTuple):
    """The middle part of what resampled data gives."""

    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The percentiles that leave out as much on both sides."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def bootstrap(
    fit: Callable[[S], T], resample: Callable[[np.random.Generator], S], count: int, seed: int
) -> list[T]:
    """Fits of `count` samples.

    Args:
        fit: of a sample.
        resample: draws one.
        count: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return [fit(resample(rng)) for _ in range(count)]
