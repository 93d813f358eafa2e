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


def _decimals(value: Number) -> str:
    return f"{value:.4f}"


def _rate(value: Number) -> str:
    return f"{quantities.count(value)} tok/s"


HELD_OUT = "Held-out text"
TRAINING = "Training"
TIME = "Time"
DATA = "Data"
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
    },
}


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
    others = [
        Row(name, _shown(quantities.number, value))
        for name, value in summary.items()
        if name not in known
    ]
    return groups | ({OTHER: others} if others else {})


def _shown(formatted: Callable[[Number], str], value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatted(value) if math.isfinite(value) else str(value)
    return "not finite" if value is None else str(value)
