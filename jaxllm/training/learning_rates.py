"""Learning rates by path: factors that the schedule's rate is multiplied by."""

import math
import re
from collections.abc import Sequence
from typing import Any

from jaxllm import trees
from jaxllm.errors import UserError

Factors = Sequence[tuple[str, float]]


def parse_factors(text: str) -> tuple[tuple[str, float], ...]:
    """`PATTERN:FACTOR,PATTERN:FACTOR` as pairs; patterns hold no comma.

    Raises:
        ValueError: an entry is not of this form, its pattern no regular expression, or its factor
            no number or negative.
    """
    return tuple(_entry(entry.strip()) for entry in text.split(",")) if text.strip() else ()


def check_factors(factors: Factors, params: trees.Tree) -> None:
    """Checks that every pattern matches a parameter that is trained.

    Raises:
        UserError: one matches none.
    """
    paths = [path for path, _ in trees.leaves_with_paths(params)]
    for pattern, _ in factors:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(
                f"config.optimizer.learning_rates: the pattern {pattern!r} matches no parameter "
                f"that is trained; the paths look like {paths[0]!r}, {paths[-1]!r}."
            )


def factor_tree(factors: Factors, params: trees.Tree) -> Any:
    """The factor of each parameter: that of the first pattern that matches its path, else 1."""
    return trees.map_with_paths(lambda path, _: trees.match([*factors, (".*", 1.0)], path), params)


def _entry(entry: str) -> tuple[str, float]:
    pattern, colon, number = entry.rpartition(":")
    if not (pattern and colon):
        raise ValueError(f"learning_rates: {entry!r} is not PATTERN:FACTOR")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"learning_rates: {pattern!r} is no regular expression ({error})"
        ) from None
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise ValueError(
            f"learning_rates: the factor of {pattern!r} must be a number of at least 0, "
            f"and was given {number!r}"
        )
    return pattern, factor
