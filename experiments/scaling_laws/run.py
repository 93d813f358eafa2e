"""Scaling laws of small models, from a sweep on `builtin:pydocs`.

    python experiments/scaling_laws/run.py --workdir=runs/scaling_laws

Makes the sweep of `configs/scaling.py:sweep`, holds its largest run out, prints what README.md
tells as Markdown, and draws `laws.png` into the work directory. What is finished is not made again,
and what was cut off goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting import quantities

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    folder = parser.parse_args().workdir.resolve()
    command = [sys.executable, "-m", "jaxllm.main", f"--config={ROOT}/configs/scaling.py:sweep"]
    made = subprocess.run([*command, f"--workdir={folder}"], check=False, cwd=ROOT)
    if made.returncode:
        return made.returncode
    scores = RunDirectory(folder).final_scores()
    print("\n".join([*_runs(folder), "", *_laws(scores), "", *_held_out(scores)]))
    found = json.loads(RunDirectory(folder).scaling.read_text())
    draw(found, folder / "laws.png")
    return 0


def _runs(folder: Path) -> Iterator[str]:
    """Losses by size and budget."""
    losses: dict[str, dict[float, float]] = {}
    sizes: dict[str, float] = {}
    seconds = 0.0
    for path in sorted((folder / "runs").glob("*/summary.json")):
        size, budget = path.parent.name.split("-", 1)
        scores = RunDirectory(path.parent).final_scores()
        losses.setdefault(size, {})[float(budget)] = scores["eval/loss"]
        sizes[size] = scores["model/parameters"]
        seconds += scores["time/total"]
    budgets = sorted({budget for found in losses.values() for budget in found})
    yield "| | N | " + " | ".join(f"{budget:.2g} FLOPs" for budget in budgets) + " |"
    yield "|---" * (2 + len(budgets)) + "|"
    for size in sorted(losses, key=sizes.__getitem__):
        cells = [f"{losses[size][b]:.4f}" if b in losses[size] else "" for b in budgets]
        yield f"| {size} | {quantities.count(sizes[size])} | " + " | ".join(cells) + " |"
    yield ""
    yield f"{quantities.duration(seconds)} in all, run after run."


def _laws(scores: Mapping[str, float]) -> Iterator[str]:
    """Constants and exponents with their intervals."""
    yield "| | | from | to |"
    yield "|---|---|---|---|"
    for name in ("E", "A", "B", "alpha", "beta"):
        for count in ("", "non_embedding/"):
            path = f"scaling/{count}{name}"
            low, high = scores[f"{path}/low"], scores[f"{path}/high"]
            yield f"| {count}{name} | {scores[path]:.4g} | {low:.4g} | {high:.4g} |"
    approaches = ("envelope", "isoflop", "parametric")
    for approach in (*approaches, *(f"non_embedding/{name}" for name in approaches)):
        path = f"scaling/{approach}/a"
        if path in scores:
            low, high = scores[f"{path}_low"], scores[f"{path}_high"]
            yield f"| a, {approach} | {scores[path]:.3f} | {low:.3f} | {high:.3f} |"
    yield f"| off by, root mean square | {scores['scaling/residual']:.2%} | | |"


def _held_out(scores: Mapping[str, float]) -> Iterator[str]:
    yield "| held out | measured | predicted | from | to | error |"
    yield "|---|---|---|---|---|---|"
    names = [name.rsplit("/", 1)[0] for name in scores if name.endswith("/predicted")]
    for name in names:
        values = [scores[f"{name}/{key}"] for key in ("measured", "predicted")]
        values += [scores[f"{name}/predicted_{end}"] for end in ("low", "high")]
        cells = " | ".join(f"{value:.4f}" for value in values)
        yield f"| {name.rsplit('/', 1)[1]} | {cells} | {scores[f'{name}/error']:+.2%} |"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Profiles, curves, best sizes, and predicted beside measured losses."""
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    profiles, curves, sizes, against = figure.subplots(1, 4)
    for number, profile in enumerate(found["profiles"]):
        label = f"{profile['flops']:.2g} FLOPs"
        profiles.plot(
            profile["parameters"], profile["losses"], "o", color=f"C{number}", label=label
        )
        profiles.plot(*profile["fitted"], color=f"C{number}", linewidth=1)
    _label(profiles, "IsoFLOP profiles: loss by parameters", "parameters")
    for curve in found["curves"]:
        curves.plot(curve["flops"], curve["losses"], color="C0", alpha=0.4, linewidth=0.8)
    ends = [curve["losses"][-1] for curve in found["curves"]]
    curves.set_ylim(min(ends) - 0.1, max(ends) + 1)
    _label(curves, "training curves: loss by FLOPs", "FLOPs")
    for number, (name, line) in enumerate(found["optima"].items()):
        sizes.plot(line["flops"], line["parameters"], color=f"C{number}", label=name)
        if points := found["points"].get(name):
            sizes.plot(points["flops"], points["parameters"], "o", color=f"C{number}")
    sizes.set_yscale("log")
    sizes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    sizes.yaxis.set_major_formatter(EngFormatter(sep=""))
    sizes.yaxis.set_minor_formatter(NullFormatter())
    _label(sizes, "the best size of a budget", "FLOPs")
    for number, (name, part) in enumerate(found["predicted"].items()):
        against.plot(part["measured"], part["predicted"], "o", color=f"C{number}", label=name)
    ends = against.get_xlim()
    against.plot(ends, ends, color="0.7", zorder=0)
    _label(against, "loss by the law, beside measured", "")
    against.set_xscale("linear")
    against.set_xlabel("measured")
    figure.savefig(path, dpi=100)


def _label(axes: Axes, title: str, label: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
