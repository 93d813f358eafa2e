"""Runs that were measured: read from run directories, or from tables of CSV.

A table has a line for each run, or several of the same `run`, which are then its curve, in order.
Its columns are found by name (`COLUMNS`); N or D may be missing where C is there, as C = 6 N D. All
further columns of numbers are scores.
"""

import csv
import dataclasses
import glob
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.plots import series
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER
from jaxllm.scaling.runs import Curve, Runs

COLUMNS = {
    "parameters": ("parameters", "N"),
    "embedding": ("embedding_parameters",),
    "tokens": ("tokens", "D"),
    "unique": ("unique_tokens",),
    "flops": ("flops", "C"),
    "loss": ("loss",),
}
"""What a table holds, and the names of its columns, of which the first that is there counts."""
RUN = "run"
"""The column that tells lines of one run from those of others."""
COUNTS = ("all", "non_embedding")
"""Which parameters N may count."""
CONTRADICTION = 0.25
"""Share by which C may differ from 6 N D: attention is counted by some."""


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """What one run spent and came to."""

    name: str
    parameters: float
    embedding: float | None
    """Of these, those of embeddings and output matrix; None: not known."""
    tokens: float
    unique: float
    """Different ones among the tokens."""
    loss: float
    """In nats a token."""
    curve: Sequence[tuple[float, float]]
    """Tokens and loss as it learnt; of one point where there is no more."""
    scores: Mapping[str, float]

    def counted(self, count: str) -> float:
        """N by one of `COUNTS`; NaN where it is not known."""
        if count == "all":
            return self.parameters
        return math.nan if self.embedding is None else self.parameters - self.embedding


def read_runs(sources: str, loss: str) -> list[MeasuredRun]:
    """The runs of all sources.

    Args:
        sources: run directories, folders of run directories, and `.csv` files, or globs of them,
            separated by commas. A run that is not finished counts where it is named itself as a
            mistake, and is left out of a folder.
        loss: the name of the loss in `summary.json` and `metrics.jsonl` of runs.

    Raises:
        UserError: there is nothing, or something that cannot be a run: its loss is not a number,
            or C is not 6 N D.
    """
    found: list[MeasuredRun] = []
    for source in filter(None, (part.strip() for part in sources.split(","))):
        paths = sorted(glob.glob(source)) or [source]
        for path in map(Path, paths):
            if path.suffix == ".csv":
                found += _of_table(path, loss)
            elif RunDirectory(path).config_path.exists():
                found.append(_of_directory(path, loss))
            else:
                inside = [each for each in _directories(path) if RunDirectory(each).final_scores()]
                if not inside:
                    raise UserError(
                        f"config.data.train: {path} is neither a run directory, nor a folder with "
                        "a finished one, nor a .csv file."
                    )
                found += [_of_directory(each, loss) for each in inside]
    if not found:
        raise UserError(
            "config.data.train: name runs, as in runs/sweep/*, or a table, as in runs.csv."
        )
    return found


def joined(measured: Sequence[MeasuredRun], evaluations: str) -> list[MeasuredRun]:
    """The runs with the scores of evaluations of them beside their own.

    Args:
        measured: runs, those of directories among them.
        evaluations: run directories of the stage `evaluate`, or globs, separated by commas.

    Raises:
        UserError: one is none, or measured another model.
    """
    by_path = {Path(run.name).resolve(): dict(run.scores) for run in measured}
    for source in filter(None, (part.strip() for part in evaluations.split(","))):
        for path in map(Path, sorted(glob.glob(source)) or [source]):
            init = Path(RunDirectory(path).config().get("init") or "").resolve()
            if init not in by_path:
                raise UserError(
                    f"config.data.evaluations: {path} measured {init}, which is none of the runs."
                )
            by_path[init] |= _finite(RunDirectory(path).final_scores())
    return [dataclasses.replace(run, scores=by_path[Path(run.name).resolve()]) for run in measured]


def as_runs(measured: Sequence[MeasuredRun], count: str) -> Runs:
    """What laws are fitted to.

    Raises:
        UserError: N is not known of a run.
    """
    sizes = [run.counted(count) for run in measured]
    for run, size in zip(measured, sizes, strict=True):
        if not size > 0:
            raise UserError(
                f"{run.name}: how many of its parameters are embeddings is not known; give "
                f"{COLUMNS['embedding'][0]}, or count all (config.scaling.count=all)."
            )
    columns = [[getattr(run, name) for run in measured] for name in ("tokens", "unique", "loss")]
    return Runs(*(np.asarray(column, np.float64) for column in (sizes, *columns)))


def as_curves(measured: Sequence[MeasuredRun], count: str) -> list[Curve]:
    """The curves of runs that have more than a point."""
    curves = []
    for run in measured:
        points = np.asarray(run.curve, np.float64).reshape(-1, 2)
        if len(points) > 1:
            curves.append(Curve(run.counted(count), points[:, 0], points[:, 1]))
    return curves


def _directories(path: Path) -> list[Path]:
    return sorted(each.parent for each in path.glob("*/config.json")) if path.is_dir() else []


def _of_directory(path: Path, loss: str) -> MeasuredRun:
    run = RunDirectory(path)
    scores = _finite(run.final_scores())
    if not run.final_scores():
        raise UserError(f"{path}: is not finished; run it to its end, or leave it out.")
    needed = {"model/parameters", "train/tokens", "train/steps", "data/train_tokens", loss}
    if missing := sorted(needed - scores.keys()):
        raise UserError(
            f"{path}: its {missing[0]} is not there or not a finite number (a run that diverged, "
            "or one of another stage than pretrain); leave it out."
        )
    tokens = scores["train/tokens"]
    learnt = series(read_metrics(run.metrics), loss)
    each = tokens / scores["train/steps"]
    return MeasuredRun(
        str(path),
        scores["model/parameters"],
        scores.get("model/embedding_parameters"),
        tokens,
        min(tokens, scores["data/train_tokens"]),
        scores[loss],
        list(zip((learnt.steps * each).tolist(), learnt.values.tolist(), strict=True)),
        scores,
    )


def _finite(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _of_table(path: Path, loss: str) -> list[MeasuredRun]:
    lines: dict[str, list[MeasuredRun]] = {}
    for number, record in _records(path):
        where = f"{path}:{number}"
        run = _of_record(where, record, loss)
        lines.setdefault(record.get(RUN) or where, []).append(run)
    found = []
    for name, points in lines.items():
        if len({point.parameters for point in points}) > 1:
            raise UserError(f"{path}: lines of the run {name} have several sizes; name it anew.")
        curve = [(point.tokens, point.loss) for point in points]
        if any(after[0] <= before[0] for before, after in itertools.pairwise(curve)):
            raise UserError(f"{path}: the tokens of the run {name} do not rise from line to line.")
        found.append(dataclasses.replace(points[-1], name=name, curve=curve))
    return found


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table with their numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for record in reader:
                yield reader.line_num, {key: value or "" for key, value in record.items() if key}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _of_record(where: str, record: Mapping[str, str], loss: str) -> MeasuredRun:
    names = COLUMNS | {"loss": (loss, *COLUMNS["loss"])}
    known = {
        what: _positive(where, found, record[found])
        for what, columns in names.items()
        if (found := next((name for name in columns if record.get(name, "").strip()), None))
    }
    given = [known.get(name) for name in ("parameters", "tokens", "flops")]
    if sum(value is not None for value in given) < 2 or "loss" not in known:
        raise UserError(
            f"{where}: wants loss and two of N, D and C (or {', '.join(names)}); its columns are "
            f"{', '.join(record)}."
        )
    parameters, tokens = _completed(where, *given)
    used = {name for columns in names.values() for name in columns} | {RUN}
    scores = dict(_scores((name, value) for name, value in record.items() if name not in used))
    unique = min(tokens, known.get("unique", tokens))
    return MeasuredRun(
        where, parameters, known.get("embedding"), tokens, unique, known["loss"], [], scores
    )


def _completed(
    where: str, parameters: float | None, tokens: float | None, flops: float | None
) -> tuple[float, float]:
    """N and D, by C = 6 N D where one is missing."""
    if parameters is None:
        assert tokens is not None and flops is not None
        return flops / (FLOPS_PER_PARAMETER * tokens), tokens
    if tokens is None:
        assert flops is not None
        return parameters, flops / (FLOPS_PER_PARAMETER * parameters)
    product = FLOPS_PER_PARAMETER * parameters * tokens
    if flops is not None and abs(math.log(flops / product)) > math.log1p(CONTRADICTION):
        raise UserError(
            f"{where}: C is {flops:.4g}, and 6 N D is {product:.4g}: correct one of them, or leave "
            "out the column of C."
        )
    return parameters, tokens


def _positive(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"{where}: {name} is {text.strip()!r}, and must be a finite number above 0; correct "
            "the line, or leave it out."
        )
    return value


def _scores(cells: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
    for name, text in cells:
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value):
            yield name, value
