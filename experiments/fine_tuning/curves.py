"""Curves of fine-tuning as one picture: training and held-out loss, and accuracy of classifiers."""

from collections.abc import Collection
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.plots import series, smoothed

PANELS = {
    "English instructions: loss, nats": (
        "eval/loss",
        {
            "all parameters": "english-full-3e-3-300",
            "pairs, the vocabulary's too": "english-vocabulary-1e-2-300",
            "pairs": "english-pairs-1e-2-300",
        },
    ),
    "Chinese instructions: loss, nats": (
        "eval/loss",
        {
            "all parameters": "chinese-full-3e-3-300",
            "pairs, the vocabulary's too": "chinese-vocabulary-1e-2-300",
            "pairs": "chinese-pairs-1e-2-300",
        },
    ),
    "Held-out accuracy": (
        "eval/accuracy",
        {"spam": "spam", "poems": "poems", "polarity": "polarity"},
    ),
}
"""Title, what is measured on held-out text, and runs by what they are called."""


def draw(folder: Path, done: Collection[str], path: Path) -> None:
    """Draws the runs of a folder that are done; training loss as lines, held-out scores as dots."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, (name, runs)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for number, (label, run) in enumerate(runs.items()):
            if run in done:
                _draw_run(axes, folder / run, name, label, f"C{number}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_run(axes: Axes, folder: Path, name: str, label: str, color: str) -> None:
    metrics = read_metrics(RunDirectory(folder).metrics)
    held_out = series(metrics, name)
    if name == "eval/loss":
        training = series(metrics, "train/loss")
        axes.plot(training.steps, smoothed(training.values), color=color, linewidth=1, label=label)
        axes.plot(held_out.steps, held_out.values, "o", color=color)
    else:
        axes.plot(held_out.steps, held_out.values, "o-", color=color, linewidth=1, label=label)
