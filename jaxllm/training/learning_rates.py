"""Learning rates by path and by layer: factors that the schedule's rate is multiplied by."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxllm import trees
from jaxllm.errors import UserError

Factors = Sequence[tuple[str, float]]
LayerFactors = Mapping[str, float | Float[np.ndarray, "..."]]
"""By path; of a parameter of a stack an array that varies along the axis of its repeats."""

_OF_LAYER = re.compile(r"stack_(\d+)/layer_(\d+)/.*")
_BELOW = r"(position_)?embedding.*"


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


def factor_tree(factors: Factors, params: trees.Tree, by_layer: LayerFactors | None = None) -> Any:
    """The factor of each parameter: that of the first pattern that matches its path, else 1; times
    that of its layer."""

    def factor(path: str, _: Any) -> Any:
        return trees.match([*factors, (".*", 1.0)], path) * (by_layer or {}).get(path, 1.0)

    return trees.map_with_paths(factor, params)


def layer_factors(decay: float, params: trees.Tree) -> LayerFactors:
    """decay^k, k being how many layers a parameter is below the top (Clark et al. 2020,
    https://arxiv.org/abs/2003.10555, appendix A): 0 of the final norm, of output matrix and heads,
    1 of the last layer, and one more than the first layer's of the embedding.

    Args:
        decay: in (0, 1].
        params: all parameters of the model, those that are not trained too; or of several models
            by their names, each of which has its own factors.
    """
    if decay == 1:
        return {}
    if not any(name.startswith("stack_") for name in params):
        return {
            f"{name}/{path}": factor
            for name, model in params.items()
            for path, factor in layer_factors(decay, model).items()
        }
    leaves = dict(trees.leaves_with_paths(params))
    places = {path: _OF_LAYER.fullmatch(path) for path in leaves}
    repeats, units = dict[int, int](), dict[int, int]()
    for path, place in places.items():
        if place:
            stack, layer = int(place[1]), int(place[2])
            repeats[stack] = leaves[path].shape[0]
            units[stack] = max(units.get(stack, 0), layer + 1)
    layers = sum(repeats[stack] * units[stack] for stack in repeats)
    found: dict[str, float | Float[np.ndarray, "..."]] = {}
    for path, place in places.items():
        if place:
            stack, layer = int(place[1]), int(place[2])
            before = sum(repeats[earlier] * units[earlier] for earlier in range(stack))
            numbers = before + units[stack] * np.arange(repeats[stack]) + layer
            values = np.float32(decay) ** (layers - numbers).astype(np.float32)
            found[path] = values.reshape(-1, *(1 for _ in leaves[path].shape[1:]))
        else:
            found[path] = decay ** (layers + 1) if re.fullmatch(_BELOW, path) else 1.0
    return found


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
