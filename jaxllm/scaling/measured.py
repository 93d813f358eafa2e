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


def read_runs(sources: Sequence[str], loss: str) -> list[MeasuredRun]:
    """The runs of all sources, each once.

    Args:
        sources: run directories of `pretrain`, folders of such, and `.csv` files, or globs. A run
            that is not finished is a mistake where it is named itself, and is left out of a folder;
            what a glob finds beside runs and tables is passed over.
        loss: the name of the loss in `summary.json` and `metrics.jsonl` of runs.

    Raises:
        UserError: there is nothing, or something that cannot be a run: its loss is not a number,
            or C is not 6 N D.
    """
    found: dict[str, MeasuredRun] = {}
    for source in sources:
        matched = [Path(path) for path in sorted(glob.glob(source)) if path != source]
        paths = [path for path in matched if path.is_dir() or path.suffix == ".csv"]
        for path in paths or [Path(source)]:
            if path.suffix == ".csv":
                runs = _of_table(path, loss)
            elif RunDirectory(path).config_path.exists() or path in matched:
                runs = [_of_directory(path, loss)]
            else:
                runs = [_of_directory(each, loss) for each in _finished(path)]
            for run in runs:
                found.setdefault(str(Path(run.name).resolve()), run)
    if not found:
        raise UserError(
            "config.data.train: name runs, as in runs/mine/*, or a table, as in runs.csv."
        )
    return list(found.values())


def joined(measured: Sequence[MeasuredRun], evaluations: Sequence[str]) -> list[MeasuredRun]:
    """The runs with the scores of evaluations of them beside their own.

    Args:
        measured: runs, those of directories among them.
        evaluations: run directories of the stage `evaluate`, or globs.

    Raises:
        UserError: one is none, or measured another model.
    """
    by_path = {Path(run.name).resolve(): dict(run.scores) for run in measured}
    for source in evaluations:
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
    rows = [(_size(run, count), run.tokens, run.unique, run.loss) for run in measured]
    return Runs(*np.asarray(rows, np.float64).T)


def as_curves(measured: Sequence[MeasuredRun], count: str) -> list[Curve]:
    """The curves of runs that have more than a point.

    Raises:
        UserError: N is not known of a run.
    """
    curves = []
    for run in measured:
        points = np.asarray(run.curve, np.float64).reshape(-1, 2)
        if len(points) > 1:
            curves.append(Curve(_size(run, count), points[:, 0], points[:, 1]))
    return curves


def _size(run: MeasuredRun, count: str) -> float:
    size = run.counted(count)
    if not size > 0:
        raise UserError(
            f"{run.name}: how many of its parameters are embeddings is not known; give "
            f"{COLUMNS['embedding'][0]}, or count all (config.scaling.count=all)."
        )
    return size


def _finished(path: Path) -> list[Path]:
    """The finished runs in a folder."""
    found = sorted(each.parent for each in path.glob("*/config.json")) if path.is_dir() else []
    finished = [each for each in found if RunDirectory(each).final_scores()]
    if not finished:
        raise UserError(
            f"config.data.train: {path} is neither a run directory, nor a folder with a finished "
            "one, nor a .csv file."
        )
    return finished


def _of_directory(path: Path, loss: str) -> MeasuredRun:
    run = RunDirectory(path)
    config, scores = run.config(), _finite(run.final_scores())
    if config.get("stage") != "pretrain" or config.get("init"):
        begun = f"begins from {config['init']}" if config.get("init") else "is of another stage"
        raise UserError(
            f"{path}: {begun}, and what its model has read is not told there; leave it out, as "
            "laws are of runs of pretrain that begin at random."
        )
    if not scores:
        raise UserError(f"{path}: is not finished; run it to its end, or leave it out.")
    needed = {"model/parameters", "train/tokens", "train/steps", "data/train_tokens", loss}
    if missing := sorted(name for name in needed if not scores.get(name, 0) > 0):
        raise UserError(
            f"{path}: its {missing[0]} is not there or no number above 0, as of a run that "
            "diverged; leave it out."
        )
    # Rows that are not filled with text have been counted in full.
    tokens = scores["train/tokens"] * scores.get("data/fill_rate", 1.0)
    each = tokens / scores["train/steps"]
    learnt = series(read_metrics(run.metrics), loss)
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
    if not lines:
        raise UserError(f"{path}: has no lines of runs below the names of its columns.")
    found = []
    for name, points in lines.items():
        sizes = [point.parameters for point in points]
        # Where N follows from C and D, it is as exact as these are written.
        if max(sizes) > 1.01 * min(sizes):
            raise UserError(f"{path}: lines of the run {name} have several sizes; name it anew.")
        curve = [(point.tokens, point.loss) for point in points]
        if any(after[0] <= before[0] for before, after in itertools.pairwise(curve)):
            raise UserError(f"{path}: the tokens of the run {name} do not rise from line to line.")
        full = name if name.startswith(f"{path}:") else f"{path}:{name}"
        found.append(dataclasses.replace(points[-1], name=full, curve=curve))
    return found


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table that hold anything, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for record in reader:
                cells = {
                    key.strip(): (value or "").strip()
                    for key, value in record.items()
                    if key and not isinstance(value, list)
                }
                if any(cells.values()):
                    yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _of_record(where: str, record: Mapping[str, str], loss: str) -> MeasuredRun:
    names = COLUMNS | {"loss": (loss, *COLUMNS["loss"])}
    known = {
        what: _positive(where, found, record[found])
        for what, columns in names.items()
        if (found := next((name for name in columns if record.get(name)), None))
    }
    given = [known.get(name) for name in ("parameters", "tokens", "flops")]
    if sum(value is not None for value in given) < 2 or "loss" not in known:
        raise UserError(
            f"{where}: wants loss and two of N (or parameters), D (or tokens) and C (or flops); "
            f"its columns are {', '.join(record)}."
        )
    parameters, tokens = _completed(where, *given)
    embedding = known.get("embedding")
    if embedding is not None and embedding >= parameters:
        raise UserError(
            f"{where}: {embedding:.4g} of {parameters:.4g} parameters are told to be embeddings; "
            f"correct {COLUMNS['embedding'][0]}, or leave the column out."
        )
    used = {name for columns in names.values() for name in columns} | {RUN}
    scores = dict(_scores((name, value) for name, value in record.items() if name not in used))
    unique = min(tokens, known.get("unique", tokens))
    return MeasuredRun(where, parameters, embedding, tokens, unique, known["loss"], [], scores)


def _completed(
    where: str, parameters: float | None, tokens: float | None, flops: float | None
) -> tuple[float, float]:
    """N and D, by C = 6 N D where one is missing."""
    if parameters is None:
        assert tokens is not None and flops is not None
        return flops / FLOPS_PER_PARAMETER / tokens, tokens
    if tokens is None:
        assert flops is not None
        return parameters, flops / FLOPS_PER_PARAMETER / parameters
    apart = math.log(FLOPS_PER_PARAMETER) + math.log(parameters) + math.log(tokens)
    if flops is not None and abs(math.log(flops) - apart) > math.log1p(CONTRADICTION):
        raise UserError(
            f"{where}: C is {flops:.4g}, and 6 N D is {math.exp(min(apart, 700)):.4g}: correct one "
            "of them, or leave out the column of C."
        )
    return parameters, tokens


def _positive(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # What is beyond is a slip, and products of it are no numbers any more.
    if not 1e-9 < value < 1e40:
        raise UserError(
            f"{where}: {name} is {text!r}, and must be a number above 0; correct the line, or "
            "leave it out."
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
