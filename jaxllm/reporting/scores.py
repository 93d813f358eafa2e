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
    error: str = ""
    """The column that holds its standard error, which is shown behind it."""


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
GOODPUT = "Goodput, over all lives of the process"
DATA = "Data"
ANSWERS = "Responses of the teacher"
CLEANING = "Cleaning, texts"
REFERENCES = "References, bits per byte"
SCALING = "Scaling law, L = E + A/N^α + B/D^β"
OTHER = "Other scores"

GROUPS: dict[str, dict[str, Score]] = {
    HELD_OUT: {
        "eval/bits_per_byte": Score("bits per byte", _decimals),
        "eval/loss": Score("loss", _decimals),
        "eval/perplexity": Score("perplexity per token", quantities.number),
        "eval/accuracy": Score("accuracy", quantities.share),
        "eval/majority": Score("accuracy of the commonest class", quantities.share),
        "eval/macro_f1": Score("macro F1", _decimals),
        "eval/micro_f1": Score("micro F1", _decimals),
        "eval/mean_absolute_error": Score("mean absolute error", quantities.number),
        "eval/root_mean_squared_error": Score("root mean squared error", quantities.number),
        "eval/pearson": Score("Pearson's correlation", _decimals),
        "eval/accuracy/better_is_longer": Score("accuracy, better is longer", quantities.share),
        "eval/accuracy/better_is_shorter": Score("accuracy, better is shorter", quantities.share),
        "eval/longer_is_better": Score("accuracy of the longer response", quantities.share),
        "eval/explained_by_length": Score("explained by length alone", quantities.share),
        "eval/calibration_error": Score("calibration error", quantities.share),
        "eval/margin": Score("margin of rewards", _decimals),
        "eval/log_ratio": Score("log ratio to the reference per token", _decimals),
        "eval/reward": Score("reward", _decimals),
        "eval/length": Score("tokens of a response", quantities.number),
        "eval/eos_rate": Score("responses that end", quantities.share),
        "eval/rankings": Score("rankings", quantities.number),
        "eval/texts": Score("texts", quantities.number),
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
        "model/embedding_parameters": Score("of embeddings and output", quantities.number),
        "model/trained_parameters": Score("parameters that are trained", quantities.number),
        "model/optimizer_bytes": Score("optimizer's memory", quantities.byte_count),
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
    GOODPUT: {
        "goodput/useful_share": Score("share of steps that count", quantities.share),
        "goodput/lives": Score("lives", quantities.number),
        "goodput/seconds/start": Score("starting", quantities.duration),
        "goodput/seconds/data": Score("making data and tokenizer", quantities.duration),
        "goodput/seconds/restore": Score("restoring", quantities.duration),
        "goodput/seconds/compile": Score("compiling, with the first step", quantities.duration),
        "goodput/seconds/step": Score("steps that count", quantities.duration),
        "goodput/seconds/data_wait": Score("waiting for batches", quantities.duration),
        "goodput/seconds/rollout": Score("letting the policy write", quantities.duration),
        "goodput/seconds/evaluation": Score("evaluating", quantities.duration),
        "goodput/seconds/checkpoint": Score("saving checkpoints", quantities.duration),
        "goodput/seconds/lost": Score("lost steps, made again", quantities.duration),
        "goodput/seconds/down": Score("down, between lives", quantities.duration),
    },
    ANSWERS: {
        "data/prompts": Score("prompts", quantities.number),
        "data/duplicate_prompts": Score("prompts left out: asked before", quantities.number),
        "data/failed": Score("prompts without an answer", quantities.number),
        "answers/responses": Score("responses", quantities.number),
        "answers/kept": Score("kept", quantities.number),
        "answers/empty": Score("left out: empty", quantities.number),
        "answers/duplicates": Score("left out: given before", quantities.number),
        "answers/cut_off": Score("left out: cut off", quantities.number),
        "answers/rejected": Score("left out: worth less", quantities.number),
        "answers/surplus": Score("left out: beside a better or earlier one", quantities.number),
        "answers/tokens": Score("tokens", quantities.number),
    },
    DATA: {
        "data/train_documents": Score("training documents", quantities.number),
        "data/train_bytes": Score("training text", quantities.byte_count),
        "data/train_tokens": Score("training tokens", quantities.number),
        "data/train_prompts": Score("training prompts", quantities.number),
        "data/eval_prompts": Score("held-out prompts", quantities.number),
        "data/dropped_prompts": Score("prompts left out, too long", quantities.number),
        "data/eval_documents": Score("held-out documents", quantities.number),
        "data/eval_bytes": Score("held-out text", quantities.byte_count),
        "data/bad_lines": Score("bad lines set aside", quantities.number),
        "data/trained_tokens": Score("training tokens that are learnt", quantities.number),
        "data/truncated": Score("examples cut, too long", quantities.number),
        "data/dropped": Score("examples left out, nothing to learn", quantities.number),
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
    SCALING: {
        "scaling/runs": Score("runs that it is fitted to", quantities.number),
        "scaling/sizes": Score("sizes among them", quantities.number),
        "scaling/E": Score("E, nats", quantities.number),
        "scaling/A": Score("A", quantities.number),
        "scaling/B": Score("B", quantities.number),
        "scaling/alpha": Score("α", _decimals),
        "scaling/beta": Score("β", _decimals),
        "scaling/of_tokens": Score("what repeated tokens count at most, times", quantities.number),
        "scaling/of_parameters": Score("what excess parameters count, times", quantities.number),
        "scaling/residual": Score("off by, root mean square", quantities.share),
    },
}

TASKS = "evaluate/"
"""The prefix of scores of tasks, `evaluate/TASK/…` and `evaluate/TASK/K_shot/…`."""

_INTERVAL = {
    "low": Score("from", quantities.number),
    "high": Score("to", quantities.number),
}

MATRICES: dict[str, tuple[str, dict[str, Score]]] = {
    "How sure the constants of the scaling law are": ("scaling/", _INTERVAL),
    "How the best N and D grow with C: N ∝ C^a, D ∝ C^b": (
        "scaling/",
        {
            "a": Score("a", _decimals),
            "a_low": Score("from", _decimals),
            "a_high": Score("to", _decimals),
            "b": Score("b", _decimals),
            "b_low": Score("from", _decimals),
            "b_high": Score("to", _decimals),
        },
    ),
    "The law by the other count of parameters": (
        "scaling/",
        {
            "E": Score("E", quantities.number),
            "A": Score("A", quantities.number),
            "B": Score("B", quantities.number),
            "alpha": Score("α", _decimals),
            "beta": Score("β", _decimals),
        },
    ),
    "What to spend FLOPs on": (
        "scaling/budget/",
        {
            "parameters": Score("N", quantities.count),
            "parameters_low": Score("from", quantities.count),
            "parameters_high": Score("to", quantities.count),
            "tokens": Score("D", quantities.count),
            "tokens_per_parameter": Score("D/N", "{:.1f}".format),
            "loss": Score("loss", _decimals),
            "loss_low": Score("from", _decimals),
            "loss_high": Score("to", _decimals),
            "loss_irreducible": Score("irreducible", _decimals),
            "loss_model": Score("of the model", _decimals),
            "loss_data": Score("of the data", _decimals),
            "doubling_parameters": Score("gained by 2 N", _decimals),
            "doubling_tokens": Score("by 2 D", _decimals),
            "doubling_both": Score("by both", _decimals),
        },
    ),
    "Runs that were held out, and what the law says of them": (
        "scaling/held_out/",
        {
            "parameters": Score("N", quantities.count),
            "tokens": Score("D", quantities.count),
            "measured": Score("measured", _decimals),
            "predicted": Score("predicted", _decimals),
            "predicted_low": Score("from", _decimals),
            "predicted_high": Score("to", _decimals),
            "error": Score("error", "{:+.2%}".format),
        },
    ),
    "Scores of tasks as sigmoids of the loss": (
        "scaling/downstream/",
        {
            "floor": Score("floor", _decimals),
            "ceiling": Score("ceiling", _decimals),
            "middle": Score("middle, nats", _decimals),
            "width": Score("width, nats", _decimals),
        },
    ),
    "Ways of classifying the same held-out texts": (
        "classify/",
        {
            "accuracy": Score("accuracy", _decimals, "accuracy_stderr"),
            "macro_f1": Score("macro F1", _decimals),
            "cut": Score("cut prompts", quantities.share),
            "texts": Score("texts", quantities.number),
        },
    ),
    "Preferences by source": (
        "preference/",
        {
            "accuracy": Score("accuracy", _decimals),
            "rankings": Score("held-out rankings", quantities.number),
        },
    ),
    "Tasks": (
        TASKS,
        {
            "score": Score("score", _decimals, "stderr"),
            "chance": Score("chance", _decimals),
            "majority": Score("majority", _decimals),
            "acc_norm": Score("acc_norm", _decimals, "acc_norm_stderr"),
            "gold_probability": Score("p(right)", _decimals, "gold_probability_stderr"),
            "perplexity": Score("perplexity", quantities.number, "perplexity_stderr"),
            "loose": Score("loose", _decimals, "loose_stderr"),
            "rules": Score("rules kept", _decimals, "rules_stderr"),
            "rules_loose": Score("loose rules", _decimals, "rules_loose_stderr"),
            "baseline_score": Score("baseline", _decimals, "baseline_score_stderr"),
            "difference": Score("difference", "{:+.4f}".format, "difference_stderr"),
            "contaminated": Score("contaminated", quantities.share),
            "unchecked": Score("unchecked", quantities.share),
            "clean_score": Score("clean score", _decimals, "clean_score_stderr"),
            "cut": Score("cut prompts", quantities.share),
            "items": Score("items", quantities.number),
        },
    ),
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
        things: dict[str, dict[str, Number]] = {}
        for name, value in summary.items():
            if place := _place(name, matrix):
                thing, column = place
                things.setdefault(thing, {})[column] = value
        columns = [c for c in matrix[1] if any(c in values for values in things.values())]
        header = ("", *(matrix[1][column].label for column in columns))
        rows = [
            (thing, *(_cell(values, column, matrix[1][column]) for column in columns))
            for thing, values in things.items()
        ]
        if rows:
            found.append(Matrix(title, header, rows))
    return found


def _place(name: str, matrix: tuple[str, dict[str, Score]]) -> tuple[str, str] | None:
    """(thing, column) of a name of a matrix; a thing may hold slashes, as a path does."""
    prefix, columns = matrix
    thing, _, column = name.removeprefix(prefix).rpartition("/")
    known = column in columns or any(column == score.error for score in columns.values())
    return (thing, column) if name.startswith(prefix) and thing and known else None


def _cell(values: Mapping[str, Number], column: str, score: Score) -> str:
    """A value with its standard error, if there is one; empty where there is no value."""
    if column not in values:
        return ""
    shown, error = _shown(score.format, values[column]), values.get(score.error)
    if error is None or not math.isfinite(error):  # of one item only
        return shown
    return f"{shown} ± {score.format(error).removeprefix('+')}"


def _shown(formatted: Callable[[Number], str], value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatted(value) if math.isfinite(value) else str(value)
    return "not finite" if value is None else str(value)
