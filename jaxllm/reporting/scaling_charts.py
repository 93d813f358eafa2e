"""Charts of scaling laws, of what `scaling.json` holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from jaxllm.reporting.plots import CSS_COLORS, Chart, chart_of, figure_of, plain_numbers

_INK, _RULE = CSS_COLORS["--ink-soft"], CSS_COLORS["--rule"]
_ONE, _TWO = CSS_COLORS["--series-1"], CSS_COLORS["--series-2"]
_FLOPS = "FLOPs"
_LOSS = "loss, nats a token"
_STYLES = {"envelope": (_TWO, "--"), "isoflop": (_ONE, "--"), "parametric": (_INK, "-")}


def scaling_charts(found: Mapping[str, Any]) -> list[Chart]:
    """What there is of: IsoFLOP profiles, the envelope of curves, best sizes by budget, predicted
    beside measured losses, and scores of tasks by loss and by FLOPs."""
    if not found:
        return []
    charts = [
        _profiles(found["profiles"], found["count"]),
        _envelope(found["curves"], found["points"].get("envelope")),
        _optima(found["optima"], found["points"], found["count"]),
        _predicted(found.get("predicted", {})),
    ]
    for name, score in found.get("downstream", {}).items():
        charts += [_by_loss(name, score), _by_flops(name, score)]
    return [chart for chart in charts if chart is not None]


def _profiles(profiles: Sequence[Mapping[str, Any]], count: str) -> Chart | None:
    """Losses by size, a parabola for each budget: the darker, the larger the budget."""
    if not profiles:
        return None
    figure, axes = _logarithmic(_sizes(count))
    for place, profile in enumerate(profiles, start=1):
        strength = 0.25 + 0.75 * place / len(profiles)
        label = f"{profile['flops']:.2g} FLOPs"
        sizes, losses = profile["parameters"], profile["losses"]
        axes.plot(sizes, losses, "o", color=_ONE, alpha=strength, ms=4, label=label)
        axes.plot(*profile["fitted"], color=_ONE, alpha=strength, linewidth=1.2)
        if profile["minimum"]:
            axes.plot(*profile["minimum"], "D", color=_TWO, ms=5)
    _legend(axes)
    return chart_of(figure, f"IsoFLOP profiles: {_LOSS}, by parameters")


def _envelope(
    curves: Sequence[Mapping[str, Any]], points: Mapping[str, Any] | None
) -> Chart | None:
    """Losses of runs as they learn, by FLOPs."""
    if not curves:
        return None
    figure, axes = _logarithmic(_FLOPS)
    sizes = sorted({curve["parameters"] for curve in curves})
    for curve in curves:
        strength = 0.2 + 0.7 * (sizes.index(curve["parameters"]) + 1) / len(sizes)
        axes.plot(curve["flops"], curve["losses"], color=_ONE, alpha=strength, linewidth=1)
    if points:
        axes.plot(points["flops"], points["losses"], "D", color=_TWO, ms=5, label="overtaken")
        _legend(axes)
    ends = [curve["losses"][-1] for curve in curves]
    # The first fall, from what is known without learning, would flatten all that follows.
    axes.set_ylim(min(ends) - 0.1, max(ends) + 0.8)
    return chart_of(figure, f"Training curves and their envelope: {_LOSS}, by FLOPs")


def _optima(
    optima: Mapping[str, Mapping[str, Any]], points: Mapping[str, Mapping[str, Any]], count: str
) -> Chart | None:
    if not optima:
        return None
    figure, axes = _logarithmic(_FLOPS)
    axes.set_yscale("log")
    for name, line in optima.items():
        color, style = _STYLES[name]
        axes.plot(line["flops"], line["parameters"], style, color=color, lw=1.4, label=name)
        if name in points:
            axes.plot(points[name]["flops"], points[name]["parameters"], "o", color=color, ms=4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return chart_of(figure, f"The best size of a budget: {_sizes(count)}")


def _predicted(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Chart | None:
    """On the grey line they agree."""
    if not runs:
        return None
    figure, axes = figure_of(f"measured {_LOSS}")
    every = [value for part in runs.values() for side in part.values() for value in side]
    ends = (min(every), max(every))
    axes.plot(ends, ends, color=_RULE, linewidth=1.4)
    for (name, part), color in zip(runs.items(), (_ONE, _TWO), strict=False):
        axes.plot(part["measured"], part["predicted"], "o", color=color, ms=4.5, label=name)
    axes.xaxis.set_major_formatter(plain_numbers())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(plain_numbers())
    _legend(axes)
    return chart_of(figure, "Predicted by the parametric law, beside measured")


def _by_loss(name: str, score: Mapping[str, Any]) -> Chart:
    figure, axes = figure_of(_LOSS)
    axes.plot(score["losses"], score["scores"], "o", color=_ONE, ms=4.5)
    axes.plot(*score["fitted"], color=_TWO, linewidth=1.4)
    axes.xaxis.set_major_formatter(plain_numbers())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(plain_numbers())
    return chart_of(figure, f"{name}, by loss")


def _by_flops(name: str, score: Mapping[str, Any]) -> Chart:
    figure, axes = _logarithmic(_FLOPS)
    axes.plot(score["flops"], score["scores"], "o", color=_ONE, ms=4.5)
    axes.yaxis.set_major_formatter(plain_numbers())
    return chart_of(figure, f"{name}, by FLOPs")


def _sizes(count: str) -> str:
    return "parameters" if count == "all" else "parameters without embeddings"


def _logarithmic(label: str) -> tuple[Figure, Axes]:
    figure, axes = figure_of(label)
    axes.set_xscale("log")
    if label != _FLOPS:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain_numbers())
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=_INK, fontsize=7.5)
