"""Means of items with their standard errors, and differences of two models on the same items."""

import math
from collections.abc import Sequence

import numpy as np


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return float(np.mean(values))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent items: s / √n, with s² = Σ (x − mean)² / (n − 1).

    For outcomes 0 and 1 of share p this is √(p (1 − p) / (n − 1)), the binomial one with Bessel's
    correction. Not a number where there is one item only.
    """
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Σ parts / Σ wholes over independent items, and its standard error.

    By the delta method (Cochran 1977, "Sampling Techniques", chapter 6) that is the standard error
    of the mean of parts − ratio · wholes, divided by the mean of the wholes: parts of one item may
    depend on each other.
    """
    found = float(np.sum(parts) / np.sum(wholes))
    residuals = [part - found * whole for part, whole in zip(parts, wholes, strict=True)]
    return found, standard_error(residuals) / mean(wholes)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """The mean difference on the same items, and its standard error.

    It is that of the differences (Miller 2024, https://arxiv.org/abs/2411.00640, section 4.2): as
    items are hard or easy for both, it is smaller than that of two independent means.
    """
    differences = [one - other for one, other in zip(values, baseline, strict=True)]
    return mean(differences), standard_error(differences)
