"""How sure a fit is: what it gives for resampled data (Efron & Tibshirani 1993, chapter 13)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxllm.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

MOST_REFUSED = 0.2
"""Share of samples without a fit, beyond which intervals would be of the others alone."""
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
    """Fits of `count` samples, of which those are left out that `fit` refuses.

    Args:
        fit: of a sample.
        resample: draws one.
        count: how many.
        seed: of the draws.

    Raises:
        UserError: more than a share `MOST_REFUSED` of them is refused.
    """
    rng = np.random.default_rng(seed)
    found, refused = [], ""
    for _ in range(count):
        sample = resample(rng)
        try:
            found.append(fit(sample))
        except UserError as error:
            refused = str(error)
    if len(found) < (1 - MOST_REFUSED) * count:
        raise UserError(
            f"how sure a fit is cannot be told, as {count - len(found)} of {count} samples of the "
            f"runs have none ({refused.rstrip('.')}); give more runs."
        )
    return found
