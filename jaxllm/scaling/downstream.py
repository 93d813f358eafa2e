"""What a loss is worth on a task: its score as a sigmoid of the loss.

Scores that are all or nothing (exact answers) stay at what guessing gives until the loss is low,
and then rise in a short stretch of compute; continuous ones of the same answers (their
log-probability) rise all along. So what looks like emergence may be the metric's (Schaeffer et al.
2023, https://arxiv.org/abs/2304.15004), and both are to be looked at side by side.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64
from scipy.optimize import least_squares

from jaxllm.errors import UserError

LEAST_RUNS = 5
"""The sigmoid has four constants."""


@dataclasses.dataclass(frozen=True)
class SigmoidLaw:
    """score = floor + (ceiling - floor) σ((middle - loss) / width)."""

    floor: float
    """What is reached without learning, such as by guessing."""
    ceiling: float
    middle: float
    """The loss at which half of the way is gone, in nats a token."""
    width: float
    """In nats a token."""

    def score(self, loss: float | np.ndarray) -> float | np.ndarray:
        """At a loss."""
        part = 0.5 * (1 + np.tanh((self.middle - loss) / (2 * self.width)))
        return self.floor + (self.ceiling - self.floor) * part


def fit_sigmoid(
    losses: Float64[np.ndarray, " runs"], scores: Float64[np.ndarray, " runs"]
) -> SigmoidLaw:
    """Of least squares, by several starts; its ends are bounded by half as much again as the scores
    spread over, as runs that stay far from an end do not tell it.

    Raises:
        UserError: too few runs, or all of one loss.
    """
    spread = float(np.ptp(losses))
    if len(losses) < LEAST_RUNS or not spread:
        raise UserError(
            f"a sigmoid needs {LEAST_RUNS} runs of different losses, and there are "
            f"{len(np.unique(losses))}: give more runs that have the score."
        )
    low, high = float(scores.min()), float(scores.max())
    beyond = 0.5 * max(high - low, 1e-6 * max(1.0, abs(high)))
    bounds = (
        [low - beyond, low, losses.min() - spread, 0.02 * spread],
        [high, high + beyond, losses.max() + spread, 4 * spread],
    )

    def apart(theta: Float64[np.ndarray, " 4"]) -> Float64[np.ndarray, " runs"]:
        return np.asarray(SigmoidLaw(*theta).score(losses) - scores)

    starts = [
        [low, high, losses.min() + share * spread, width * spread]
        for share in (0.1, 0.5, 0.9)
        for width in (0.05, 0.3)
    ]
    found = [
        least_squares(apart, np.clip(start, *bounds), bounds=bounds, x_scale="jac")
        for start in starts
    ]
    return SigmoidLaw(*map(float, min(found, key=lambda result: result.cost).x))
