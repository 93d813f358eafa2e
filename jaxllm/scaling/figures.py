"""What charts of laws are made of, as plain numbers: `scaling.json` of a run of the stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.scaling.estimates import Estimate, Law, optimum, predictions
from jaxllm.scaling.frontiers import Frontier, profiles
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
                "tokens": curve.tokens.tolist(),
                "losses": curve.losses.tolist(),
            }
            for curve in as_curves(fitted, count)
        ],
        "profiles": [
            {
                "flops": each.flops,
                "parameters": each.runs.parameters.tolist(),
                "losses": each.runs.losses.tolist(),
                "parabola": each.parabola._asdict(),
                "has_minimum": each.has_minimum,
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


def _against(runs: Runs, law: Law) -> dict[str, list[float]]:
    return {"measured": runs.losses.tolist(), "predicted": predictions(runs, law)}
