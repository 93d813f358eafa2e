"""Curves of policies as one picture, a line for each seed."""

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.plots import series

EXACT = "eval/rewards/exact_match"
PANELS = {
    "PPO by the exact reward: right": (EXACT, ("exact",)),
    "its divergence, nats a response": ("ppo/kl", ("exact",)),
    "PPO by a reward model: its rewards": ("eval/rewards/reward_model", ("held", "free")),
    "and what is right of that": (EXACT, ("held", "free")),
    "GRPO after worked examples: right": ("eval/rewards/numeric", ("grpo", "early")),
}
"""Title, what is measured, and what runs are called."""


def draw(folder: Path, done: Collection[str], seeds: Sequence[int], path: Path) -> None:
    """Draws the runs of a folder that are done."""
    figure = Figure(figsize=(16, 3.4), layout="constrained")
    for axes, (title, (name, called)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for number, kind in enumerate(called):
            for seed in seeds:
                if f"{kind}-{seed}" in done:
                    label = kind if seed == seeds[0] else ""
                    _draw_run(axes, folder / f"{kind}-{seed}", name, label, f"C{number}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.spines[["top", "right"]].set_visible(False)
        if len(called) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_run(axes: Axes, folder: Path, name: str, label: str, color: str) -> None:
    measured = series(read_metrics(RunDirectory(folder).metrics), name)
    axes.plot(measured.steps, measured.values, color=color, linewidth=1, label=label)
