"""What scaling laws are fitted to: runs by what they spent and came to, and curves of training."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxllm.scaling.laws import FLOPS_PER_PARAMETER


class Runs(NamedTuple):
    """Finished runs; float64."""

    parameters: Float64[np.ndarray, " runs"]
    tokens: Float64[np.ndarray, " runs"]
    """That were read."""
    unique: Float64[np.ndarray, " runs"]
    """Different ones among them."""
    losses: Float64[np.ndarray, " runs"]
    """In nats a token, held out."""

    @property
    def flops(self) -> Float64[np.ndarray, " runs"]:
        """C = 6 N D."""
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens

    def chosen(self, index: Int[np.ndarray, " chosen"]) -> "Runs":
        """Some of them, with repeats."""
        return Runs(*(array[index] for array in self))


def runs_once(
    parameters: Float64[np.ndarray, " runs"],
    tokens: Float64[np.ndarray, " runs"],
    losses: Float64[np.ndarray, " runs"],
) -> Runs:
    """Runs that have read each token once."""
    return Runs(parameters, tokens, tokens, losses)


class Curve(NamedTuple):
    """The loss of one run as it learnt; float64."""

    parameters: float
    tokens: Float64[np.ndarray, " points"]
    """Read by then, ascending."""
    losses: Float64[np.ndarray, " points"]


def resampled(runs: Runs, rng: np.random.Generator) -> Runs:
    """As many runs, drawn with replacement."""
    return runs.chosen(rng.integers(len(runs.losses), size=len(runs.losses)))


def resampled_curves(curves: Sequence[Curve], rng: np.random.Generator) -> list[Curve]:
    """The same curves, of as many points each, drawn with replacement."""
    drawn = []
    for curve in curves:
        index = np.sort(rng.integers(len(curve.losses), size=len(curve.losses)))
        drawn.append(Curve(curve.parameters, curve.tokens[index], curve.losses[index]))
    return drawn
