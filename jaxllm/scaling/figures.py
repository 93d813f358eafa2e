"""What charts of laws are made of, as plain numbers: `scaling.json` of a run of the stage."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxllm.scaling.downstream import SigmoidLaw
from jaxllm.scaling.estimates import Estimate, Law, optimum, predictions
from jaxllm.scaling.frontiers import Frontier, profiles
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER
from jaxllm.scaling.measured import MeasuredRun, as_curves, as_runs
from jaxllm.scaling.runs import Runs

_POINTS = 50


def figures(
    fitted: Sequence[MeasuredRun],
    held_out: Sequence[MeasuredRun],
    found: Mapping[str, Estimate],
    count: str,
) -> dict[str, Any]:
    """Curves, profiles, best sizes by budget, and predicted beside measured losses.

    Args:
        fitted: the runs that laws are fitted to.
        held_out: others.
        found: the laws by approach.
        count: which parameters N counts.
    """
    runs = as_runs(fitted, count)
    laws = {name: estimated.law for name, estimated in found.items()}
    found_at = [law.flops for law in laws.values() if isinstance(law, Frontier)]
    spent = np.concatenate([runs.flops, *found_at])
    budgets = np.geomspace(spent.min(), spent.max(), _POINTS).tolist()
    drawn: dict[str, Any] = {
        "count": count,
        "curves": [
            {
                "parameters": curve.parameters,
                "flops": (FLOPS_PER_PARAMETER * curve.parameters * curve.tokens).tolist(),
                "losses": curve.losses.tolist(),
            }
            for curve in as_curves(fitted, count)
        ],
        "profiles": [
            {
                "flops": each.flops,
                "parameters": each.runs.parameters.tolist(),
                "losses": each.runs.losses.tolist(),
                "fitted": _line(each.parabola.loss, each.runs.parameters, np.geomspace),
                "minimum": [each.parabola.best, each.parabola.least] if each.has_minimum else [],
            }
            for each in profiles(runs)
        ],
        "points": {
            name: {
                "flops": law.flops.tolist(),
                "parameters": law.parameters.tolist(),
                "losses": law.losses.tolist(),
            }
            for name, law in laws.items()
            if isinstance(law, Frontier)
        },
        "optima": {
            name: {
                "flops": budgets,
                "parameters": [float(optimum(law, flops, np.inf).parameters) for flops in budgets],
            }
            for name, law in laws.items()
        },
    }
    if (law := laws.get("parametric")) is not None:
        drawn["predicted"] = {"fitted": _against(runs, law)}
        if held_out:
            drawn["predicted"]["held out"] = _against(as_runs(held_out, count), law)
    return drawn


def score_figures(
    runs: Runs, scores: Float64[np.ndarray, " runs"], law: SigmoidLaw
) -> dict[str, Any]:
    """A score of runs by loss and by FLOPs, and the sigmoid through it."""
    return {
        "losses": runs.losses.tolist(),
        "flops": runs.flops.tolist(),
        "scores": scores.tolist(),
        "fitted": _line(law.score, runs.losses, np.linspace),
    }


def _line(
    function: Callable[[np.ndarray], Any], ends: np.ndarray, spaced: Callable[..., np.ndarray]
) -> list[list[float]]:
    """Points of a curve: where, and its values."""
    places = spaced(ends.min(), ends.max(), _POINTS)
    return [places.tolist(), np.asarray(function(places)).tolist()]


def _against(runs: Runs, law: Law) -> dict[str, list[float]]:
    return {"measured": runs.losses.tolist(), "predicted": predictions(runs, law)}
