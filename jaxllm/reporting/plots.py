"""Curves as SVG text to be placed inside an HTML page: of training, and of tasks by examples.

Drawn by matplotlib's object interface, so nothing depends on a display or on global figures. The
colours are those of the page: the SVG refers to the CSS variables of `CSS_COLORS`, which the page
sets for light and dark. Text stays text, in the fonts of the page, so any script can be shown.
"""

import dataclasses
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator

from jaxllm.reporting.quantities import Number
from jaxllm.reporting.scores import TASKS

CSS_COLORS = {
    "--ink-soft": "#010101",
    "--rule": "#020202",
    "--series-1": "#030303",
    "--series-2": "#040404",
}
"""CSS variables and the placeholders that matplotlib draws with in their place."""

SIZE_INCHES = (5.4, 2.7)
FONT_POINTS = 9.5
MOST_POINTS = 1500
"""A line of more points than a screen has pixels only makes the page heavy."""
SMOOTHING_SHARE = 0.05
"""The smoothed line averages over about this share of the run."""

_OF_SHOTS = re.compile(rf"{TASKS}(?P<task>.+)/(?P<shots>\d+)_shot/(?P<name>score|stderr|chance)")


@dataclasses.dataclass(frozen=True)
class Chart:
    """One drawn figure."""

    title: str
    """What it shows, with its unit, as plain text."""
    svg: str
    """An `<svg>` element."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Values of one name over the steps at which it was logged; both finite."""

    steps: Float64[np.ndarray, "points"]
    """Optimizer updates, ascending."""
    values: Float64[np.ndarray, "points"]
    """What was logged, in the unit of its name."""


def training_charts(metrics: Sequence[dict[str, Number]]) -> list[Chart]:
    """The charts for which `metrics` (lines of `metrics.jsonl`) hold at least two points.

    Reward of what a policy writes, loss, learning rate, gradient norm and throughput come first;
    then every other name that changes over the run, under its own name, but those of single sources
    of text, whose number has no limit: a table has them.
    """
    drawn = [
        _held_out_chart(metrics, "rollout/reward", "eval/reward", "Reward"),
        _held_out_chart(metrics, "train/loss", "eval/loss", "Loss, nats"),
    ]
    first = (
        ("train/learning_rate", "Learning rate", plain_numbers()),
        ("train/grad_norm", "Gradient norm", plain_numbers()),
        ("train/tokens_per_second", "Tokens per second", EngFormatter(sep="")),
    )
    drawn += [
        _line_chart(metrics, name, title, formatter, smooth=name == "train/grad_norm")
        for name, title, formatter in first
    ]
    shown = {"step", "time", *(name for name, _, _ in first)}
    shown |= {"train/loss", "eval/loss", "rollout/reward", "eval/reward"}
    for name in sorted({name for record in metrics for name in record} - shown):
        if name.startswith("data/source/"):
            continue
        values = series(metrics, name).values
        if len(values) and values.min() < values.max():
            drawn.append(_line_chart(metrics, name, name, plain_numbers()))
    return [chart for chart in drawn if chart is not None]


def task_charts(summary: Mapping[str, Any]) -> list[Chart]:
    """For each task measured with several numbers of examples, its score by that number.

    Bars are one standard error to each side; the grey line is what guessing gives, if known.
    """
    tasks: dict[str, dict[str, dict[int, float]]] = {}
    for path, value in summary.items():
        match = _OF_SHOTS.fullmatch(path)
        if match and isinstance(value, int | float) and math.isfinite(value):
            by_shots = tasks.setdefault(match["task"], {}).setdefault(match["name"], {})
            by_shots[int(match["shots"])] = value
    return [
        _shots_chart(task, names)
        for task, names in tasks.items()
        if len(names.get("score", {})) > 1
    ]


def calibration_charts(rewards: Mapping[str, Any]) -> list[Chart]:
    """How often the response with the higher reward is preferred, by how probable that was to be:
    of what `rewards.json` holds; none without it. On the grey line they agree, and the larger a
    point, the more pairs."""
    bins = rewards.get("calibration", [])
    if not bins:
        return []
    figure, axes = figure_of("probability by the rewards")
    ends = (0.5, 1.0)
    axes.plot(ends, ends, color=CSS_COLORS["--rule"], linewidth=1.4)
    axes.scatter(
        [each["predicted"] for each in bins],
        [each["observed"] for each in bins],
        s=[20 + 180 * each["share"] for each in bins],
        color=CSS_COLORS["--series-1"],
    )
    axes.set_ylim(0, 1.05)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return [chart_of(figure, "Calibration: share of pairs that are right")]


def series(metrics: Sequence[dict[str, Number]], name: str) -> Series:
    """The finite values of `name` and their steps; empty if there are none."""
    points = [
        (record["step"], record[name])
        for record in metrics
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return Series(table[:, 0], table[:, 1])


def smoothed(values: Float64[np.ndarray, "points"]) -> Float64[np.ndarray, "points"]:
    """Moving average over about `SMOOTHING_SHARE` of the points, centred so that it does not lag.

    Near the start the window shrinks on both sides, so that the steep first fall is not flattened;
    near the end it only loses what is not there yet, so that the last values stay smooth.
    """
    position = np.arange(len(values))
    reach = np.minimum(math.ceil(SMOOTHING_SHARE * len(values) / 2), position)
    stop = np.minimum(position + reach + 1, len(values))
    start = position - reach
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[stop] - sums[start]) / (stop - start)


def _held_out_chart(
    metrics: Sequence[dict[str, Number]], in_training: str, held_out_name: str, title: str
) -> Chart | None:
    train, held_out = series(metrics, in_training), series(metrics, held_out_name)
    if len(train.values) < 2:
        return None
    figure, axes = figure_of()
    _draw_smoothed(axes, train, "training")
    if len(held_out.values):
        axes.plot(
            *_thinned(held_out),
            color=CSS_COLORS["--series-2"],
            marker="o",
            markersize=4.5,
            linewidth=1,
            label="held out",
        )
    axes.legend(frameon=False, labelcolor=CSS_COLORS["--ink-soft"], loc="upper right")
    return chart_of(figure, title)


def _line_chart(
    metrics: Sequence[dict[str, Number]],
    name: str,
    title: str,
    formatter: Formatter,
    smooth: bool = False,
) -> Chart | None:
    data = series(metrics, name)
    if len(data.values) < 2:
        return None
    figure, axes = figure_of()
    if smooth:
        _draw_smoothed(axes, data, name)
    else:
        axes.plot(*_thinned(data), color=CSS_COLORS["--series-1"], linewidth=1.6)
    if data.values.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(formatter)
    return chart_of(figure, title)


def _shots_chart(task: str, names: dict[str, dict[int, float]]) -> Chart:
    shots = sorted(names["score"])
    places = range(len(shots))  # evenly: their numbers often double
    errors = [names.get("stderr", {}).get(number, 0.0) for number in shots]
    figure, axes = figure_of("examples")
    axes.errorbar(
        places,
        [names["score"][number] for number in shots],
        yerr=errors,
        color=CSS_COLORS["--series-1"],
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1,
    )
    for chance in set(names.get("chance", {}).values()):
        axes.axhline(chance, color=CSS_COLORS["--rule"], linewidth=1.4)
    axes.set_xticks(places, [str(number) for number in shots])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain_numbers())
    return chart_of(figure, f"{task}: score by examples in the prompt")


def _draw_smoothed(axes: Axes, data: Series, label: str) -> None:
    color = CSS_COLORS["--series-1"]
    axes.plot(*_thinned(data), color=color, linewidth=0.8, alpha=0.4)
    averaged = Series(data.steps, smoothed(data.values))
    axes.plot(*_thinned(averaged), color=color, linewidth=1.8, label=label)


def figure_of(x_label: str = "step") -> tuple[Figure, Axes]:
    """An empty figure in the style of the page; ticks are whole numbers."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(CSS_COLORS["--rule"])
    axes.grid(axis="y", color=CSS_COLORS["--rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelcolor=CSS_COLORS["--ink-soft"], labelsize=FONT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(x_label, color=CSS_COLORS["--ink-soft"], fontsize=FONT_POINTS)
    axes.margins(x=0.015)
    return figure, axes


def plain_numbers() -> Formatter:
    """Three significant digits."""
    return FuncFormatter(lambda value, _: f"{value:.3g}")


def _thinned(data: Series) -> tuple[Float64[np.ndarray, "kept"], Float64[np.ndarray, "kept"]]:
    stride = math.ceil(len(data.steps) / MOST_POINTS)
    # Counted back from the end: where the run stands now is the point nobody wants to miss.
    kept = slice(None) if stride <= 1 else np.arange(len(data.steps))[::-stride][::-1]
    return data.steps[kept], data.values[kept]


def chart_of(figure: Figure, title: str) -> Chart:
    """A figure as part of the page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text is kept as text, so glyphs that matplotlib's own font lacks are the browser's matter.
    # The salt makes ids the same each time, and different from chart to chart.
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Chart(title, _inline(buffer.getvalue(), title))


def _inline(document: str, title: str) -> str:
    """An SVG document as an element of an HTML page, in the colours and fonts of that page."""
    view_box = re.search(r'viewBox="[^"]*"', document)
    assert view_box is not None
    body = document[document.index("<defs>") : document.rindex("</svg>")]
    for variable, placeholder in CSS_COLORS.items():
        body = body.replace(placeholder, f"var({variable})")
    # Size alone, so that the family is inherited from the page; written either of two ways.
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family:[^;\"]*;?", "", body)
    body = body.replace("xlink:href", "href")
    # Group names ("axes_1") repeat from chart to chart, and an id must be unique on a page.
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)
    return f'<svg {view_box[0]} role="img" aria-label="{escape(title)}">{body}</svg>'
