"""The names of `summary.json`: what each is called in tables and how its number is written."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxllm.reporting import quantities
from jaxllm.reporting.quantities import Number


class Score(NamedTuple):
    """How one name is shown."""

    label: str
    format: Callable[[Number], str]


class Row(NamedTuple):
    """One line of a table of scores."""

    label: str
    text: str


class Matrix(NamedTuple):
    """A table of several things by the same scores."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _decimals(value: Number) -> str:
    return f"{value:.4f}"


def _rate(value: Number) -> str:
    return f"{quantities.count(value)} tok/s"


HELD_OUT = "Held-out text"
TRAINING = "Training"
TIME = "Time"
DATA = "Data"
CLEANING = "Cleaning, texts"
REFERENCES = "References, bits per byte"
OTHER = "Other scores"

GROUPS: dict[str, dict[str, Score]] = {
    HELD_OUT: {
        "eval/bits_per_byte": Score("bits per byte", _decimals),
        "eval/loss": Score("loss, nats per token", _decimals),
        "eval/perplexity": Score("perplexity per token", quantities.number),
        "eval/accuracy": Score("accuracy", quantities.share),
        "eval/macro_f1": Score("macro F1", _decimals),
        "eval/tokens": Score("tokens", quantities.number),
        "eval/bytes": Score("bytes", quantities.byte_count),
    },
    REFERENCES: {
        "reference/gzip/bits_per_byte": Score("gzip -9", _decimals),
        "reference/xz/bits_per_byte": Score("xz -9", _decimals),
        "reference/xz_with_train/bits_per_byte": Score("xz -9 after training text", _decimals),
        "reference/unigram/bits_per_byte": Score("token unigram", _decimals),
        "reference/bigram/bits_per_byte": Score("token bigram", _decimals),
        "reference/kneser_ney/bits_per_byte": Score("Kneser–Ney 5-gram", _decimals),
    },
    TRAINING: {
        "model/parameters": Score("parameters", quantities.number),
        "train/steps": Score("steps", quantities.number),
        "train/tokens": Score("tokens", quantities.number),
        "train/tokens_per_second": Score("throughput", _rate),
        "train/mfu": Score("MFU", quantities.share),
        "train/data_wait_share": Score("waiting for data", quantities.share),
        "train/skipped": Score("steps skipped, not finite", quantities.number),
    },
    TIME: {
        "time/read": Score("reading and cleaning", quantities.duration),
        "time/tokenizer": Score("training the tokenizer", quantities.duration),
        "time/tokenise": Score("tokenising", quantities.duration),
        "time/compile": Score("compiling", quantities.duration),
        "time/train": Score("training", quantities.duration),
        "time/total": Score("total", quantities.duration),
    },
    DATA: {
        "data/train_documents": Score("training documents", quantities.number),
        "data/train_bytes": Score("training text", quantities.byte_count),
        "data/train_tokens": Score("training tokens", quantities.number),
        "data/eval_documents": Score("held-out documents", quantities.number),
        "data/eval_bytes": Score("held-out text", quantities.byte_count),
        "data/bad_lines": Score("bad lines set aside", quantities.number),
        "data/fill_rate": Score("rows filled", quantities.share),
    },
    CLEANING: {
        "data/cleaning/unicode": Score("brought to normal form", quantities.number),
        "data/cleaning/control_characters": Score("control characters", quantities.number),
        "data/cleaning/whitespace": Score("white space", quantities.number),
        "data/cleaning/min_chars": Score("left out: too short", quantities.number),
        "data/cleaning/exact_duplicates": Score("left out: duplicates", quantities.number),
        "data/cleaning/near_duplicates": Score("left out: near-duplicates", quantities.number),
        "data/cleaning/held_out_duplicates": Score("left out: held out too", quantities.number),
    },
}

MATRICES: dict[str, tuple[str, dict[str, Score]]] = {
    "Sources": (
        "data/source/",
        {
            "tokens": Score("tokens", quantities.count),
            "share": Score("share of rows", quantities.share),
            "epochs": Score("epochs", "{:.3g}".format),
        },
    ),
    "Tokenizers": (
        "tokenizer/",
        {
            "vocab_size": Score("vocabulary", quantities.number),
            "bytes_per_token": Score("bytes / token", "{:.3f}".format),
            "unknown": Score("unknown", quantities.share),
            "lossless": Score("lossless", quantities.share),
            "train_seconds": Score("trained in", quantities.duration),
            "megabytes_per_second": Score("MB / s", "{:.1f}".format),
            "bits_per_byte": Score("bits / byte", "{:.3f}".format),
        },
    ),
}
"""Names `PREFIX/THING/COLUMN` of `summary.json`, by title: their prefix and columns."""


def score_rows(summary: Mapping[str, Number]) -> dict[str, list[Row]]:
    """The scores that `summary` has, as rows by group; groups without any are left out.

    Names that no group knows (tasks of an evaluation, say) come last under their own name.
    """
    groups = {}
    for group, scores in GROUPS.items():
        rows = [
            Row(score.label, _shown(score.format, summary[name]))
            for name, score in scores.items()
            if name in summary
        ]
        if rows:
            groups[group] = rows
    known = {name for scores in GROUPS.values() for name in scores}
    known |= {name for name in summary if any(_place(name, m) for m in MATRICES.values())}
    others = [
        Row(name, _shown(quantities.number, value))
        for name, value in summary.items()
        if name not in known
    ]
    return groups | ({OTHER: others} if others else {})


def score_matrices(summary: Mapping[str, Number]) -> list[Matrix]:
    """The tables of several things that `summary` has, each with the columns that it has."""
    found = []
    for title, matrix in MATRICES.items():
        cells: dict[str, dict[str, str]] = {}
        for name, value in summary.items():
            if place := _place(name, matrix):
                thing, column = place
                cells.setdefault(thing, {})[column] = _shown(matrix[1][column].format, value)
        columns = [c for c in matrix[1] if any(c in row for row in cells.values())]
        header = ("", *(matrix[1][column].label for column in columns))
        rows = [(thing, *(row.get(c, "") for c in columns)) for thing, row in cells.items()]
        if rows:
            found.append(Matrix(title, header, rows))
    return found


def _place(name: str, matrix: tuple[str, dict[str, Score]]) -> tuple[str, str] | None:
    """(thing, column) of a name of a matrix; a thing may hold slashes, as a path does."""
    prefix, columns = matrix
    thing, _, column = name.removeprefix(prefix).rpartition("/")
    return (thing, column) if name.startswith(prefix) and thing and column in columns else None


def _shown(formatted: Callable[[Number], str], value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatted(value) if math.isfinite(value) else str(value)
    return "not finite" if value is None else str(value)
