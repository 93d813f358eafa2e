"""`report.html`: one self-contained page about a run, made from the files in its directory."""

import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from jaxllm.config import flatten
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
from jaxllm.reporting import quantities, scores
from jaxllm.reporting.classes import class_table, confusion
from jaxllm.reporting.goodput import Life, goodput_scalars, lost_steps, read_lives
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.plots import calibration_charts, task_charts, training_charts
from jaxllm.reporting.samples import Sample, read_samples
from jaxllm.reporting.scaling_charts import scaling_charts

HEADLINES = {
    "eval/bits_per_byte": scores.Score("bits per byte", "{:.3f}".format),
    "eval/loss": scores.Score("held-out loss", "{:.3f}".format),
    "eval/perplexity": scores.Score("perplexity", quantities.number),
    "eval/accuracy": scores.Score("accuracy", quantities.share),
    "eval/macro_f1": scores.Score("macro F1", "{:.3f}".format),
    "eval/reward": scores.Score("reward", "{:.3f}".format),
    "model/parameters": scores.Score("parameters", quantities.count),
    "train/tokens_per_second": scores.Score("tokens / s", quantities.count),
    "train/mfu": scores.Score("MFU", quantities.share),
    "time/total": scores.Score("total time", quantities.duration),
}
"""What is shown large at the top, as far as the run has it, in fewer digits than the tables."""


class Bar(NamedTuple):
    """One bar of a chart whose lengths are shares."""

    label: str
    text: str
    share: float
    """Length, 0 to 1: of the longest bar, or of the whole where bars are parts of one."""
    is_model: bool = False
    """Whether it is this run's model, to be set apart from the references."""
    part: int = 0
    """The number of its colour, where bars are parts of one whole."""


class Goodput(NamedTuple):
    """What the page tells of the wall time of a run."""

    verdict: str
    parts: list[Bar]
    lives: scores.Matrix


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `report.html` into `run_dir`, in one atomic change, and returns its path.

    Made from `config.json`, `metrics.jsonl`, `samples.md`, `summary.json`, `classes.json`,
    `rewards.json`, `scaling.json` and `goodput.json`, as far as they exist. The page refers to
    nothing outside itself, and all text from these files is escaped: what a model writes never
    becomes part of the page's HTML.

    Raises:
        UserError: `run_dir` is no directory, or one of the JSON files cannot be read.
        OSError: the page cannot be written; a page already there stays as it was.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run directory to report on.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxllm.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(_contents(run_dir))
    path = run_dir / "report.html"
    write_atomically(path, page)
    return path


def comparison_bars(summary: Mapping[str, Any]) -> list[Bar]:
    """Bits per byte of the model and of the references, fewest first; empty without both."""
    entries = [
        (score.label, value, False)
        for name, score in scores.GROUPS[scores.REFERENCES].items()
        if (value := _finite(summary, name)) is not None
    ]
    model = _finite(summary, "eval/bits_per_byte")
    if not entries or model is None:
        return []
    entries.append(("this model", model, True))
    entries.sort(key=lambda entry: entry[1])
    longest = max(entries[-1][1], 1e-9)
    return [Bar(label, f"{value:.3f}", value / longest, own) for label, value, own in entries]


def time_bars(summary: Mapping[str, Any]) -> list[Bar]:
    """The phases of a run as shares of its total time, and what no phase accounts for."""
    total = _finite(summary, "time/total")
    if not total:
        return []
    phases = {
        score.label: (score.format, value)
        for name, score in scores.GROUPS[scores.TIME].items()
        if name != "time/total" and (value := _finite(summary, name)) is not None
    }
    formatted = scores.GROUPS[scores.TIME]["time/total"].format
    rest = total - sum(value for _, value in phases.values())
    if rest > 0.005 * total:
        phases["everything else"] = (formatted, rest)
    whole = max(total, sum(value for _, value in phases.values()))
    return [
        Bar(label, form(value), value / whole, part=part)
        for part, (label, (form, value)) in enumerate(phases.items(), start=1)
    ]


def goodput(lives: Sequence[Life]) -> Goodput | None:
    """What all lives of a run have spent their time on; None without any."""
    if not lives:
        return None
    scalars = goodput_scalars(lives)
    named = scores.GROUPS[scores.GOODPUT]
    seconds = [name for name in named if name.startswith("goodput/seconds/")]
    wall = sum(scalars[name] for name in seconds)
    parts = [
        Bar(
            named[name].label,
            f"{quantities.duration(value)} ({quantities.share(value / wall)})",
            value / wall,
            part=_GOODPUT_PARTS[name.removeprefix("goodput/seconds/")],
        )
        for name in seconds
        if (value := scalars[name]) > 0
    ]
    verdict = (
        f"{quantities.share(scalars['goodput/useful_share'])} of {quantities.duration(wall)} went "
        f"into steps that count, over {len(lives)} {'lives' if len(lives) > 1 else 'life'} of the "
        "process."
    )
    return Goodput(verdict, parts, _table_of_lives(lives))


# Colours of the stacked bar: of steps that count the page's own blue, of lost ones its orange.
_GOODPUT_PARTS = {
    "start": 7,
    "data": 2,
    "restore": 8,
    "compile": 5,
    "step": 4,
    "data_wait": 9,
    "rollout": 11,
    "evaluation": 3,
    "checkpoint": 10,
    "lost": 1,
    "down": 6,
}


def _table_of_lives(lives: Sequence[Life]) -> scores.Matrix:
    header = ("began", "lasted", "from step", "to step", "steps lost")
    rows: list[tuple[str, ...]] = []
    for life, lost in zip(lives, lost_steps(lives), strict=True):
        began = datetime.datetime.fromtimestamp(life.began, datetime.UTC)
        steps = ("", "", "")
        if life.first_step is not None and life.last_step is not None:
            steps = (f"{life.first_step:,}", f"{life.last_step:,}", f"{lost:,}")
        lasted = quantities.duration(life.wall_seconds)
        rows.append((f"{began:%Y-%m-%d %H:%M:%S} UTC", lasted, *steps))
    return scores.Matrix("Lives of the process", header, rows)


def _contents(run_dir: Path) -> dict[str, Any]:
    recorded = _read_json(run_dir / "config.json")
    summary = _read_json(run_dir / "summary.json")
    versions = recorded.pop("versions", {})
    config = flatten(recorded.get("config", recorded))
    rows = scores.score_rows(summary)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    rewards = _read_json(run_dir / "rewards.json")
    charts = [*training_charts(metrics), *task_charts(summary), *calibration_charts(rewards)]
    charts += scaling_charts(_read_json(run_dir / "scaling.json"))
    classes = _read_json(run_dir / "classes.json")
    tables = [table for table in (class_table(classes), *scores.score_matrices(summary)) if table]
    samples = _samples_by_step(read_samples(run_dir / "samples.md"))
    return {
        "name": run_dir.resolve().name,
        "stage": config.get("stage", ""),
        "last_step": metrics[-1]["step"] if metrics else None,
        "headlines": _headlines(summary),
        "comparison": comparison_bars(summary),
        "verdict": _verdict(summary),
        "charts": [(chart.title, Markup(chart.svg)) for chart in charts],
        "samples": samples,
        "time": time_bars(summary),
        "goodput": goodput(read_lives(run_dir / "goodput.json")),
        "confusion": confusion(classes),
        "matrices": tables,
        # These have their own sections, which say more than a table of them would.
        "score_groups": {
            name: group
            for name, group in rows.items()
            if name not in (scores.REFERENCES, scores.GOODPUT)
        },
        "config": config,
        "versions": versions,
    }


def _headlines(summary: Mapping[str, Any]) -> list[scores.Row]:
    return [
        scores.Row(score.label, score.format(value))
        for name, score in HEADLINES.items()
        if (value := _finite(summary, name)) is not None
    ]


def _verdict(summary: Mapping[str, Any]) -> str:
    """One sentence on the model against gzip, the reference that everybody knows."""
    model = _finite(summary, "eval/bits_per_byte")
    gzip = _finite(summary, "reference/gzip/bits_per_byte")
    if model is None or not gzip:
        return ""
    difference = (gzip - model) / gzip
    direction = "fewer" if difference >= 0 else "more"
    return f"The model needs {abs(difference):.0%} {direction} bits than gzip -9 for the same text."


def _samples_by_step(samples: list[Sample]) -> list[tuple[int, list[Sample]]]:
    """Newest step first."""
    steps: dict[int, list[Sample]] = {}
    for sample in samples:
        steps.setdefault(sample.step, []).append(sample)
    return sorted(steps.items(), reverse=True)


def _finite(summary: Mapping[str, Any], name: str) -> float | None:
    value = summary.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); remove or mend it.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object; remove or mend it.")
    return values
