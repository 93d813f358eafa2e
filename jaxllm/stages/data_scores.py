"""What stages tell of their data: counts of reading and cleaning, and the mixture of sources."""

import sys

from jaxllm.data.corpus import Corpus
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.training_rows import TrainingRows
from jaxllm.reporting import quantities
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.tables import print_table


def reading_scores(split: SplitDocuments) -> dict[str, float]:
    """What was set aside in reading and what cleaning did, by the names of a summary."""
    cleaned = {f"data/cleaning/{name}": float(count) for name, count in split.cleaned.items()}
    return {"data/bad_lines": float(split.bad_lines)} | cleaned


def data_scores(corpus: Corpus) -> dict[str, float]:
    """Counts of documents, bytes and tokens, and of what was left out."""
    split = corpus.split
    scores = reading_scores(split) | {
        "data/train_documents": float(sum(store.num_documents for store in corpus.train)),
        "data/train_bytes": float(split.train_bytes),
        "data/train_tokens": float(sum(store.num_tokens for store in corpus.train)),
        "data/eval_documents": float(corpus.eval.num_documents),
        "data/eval_bytes": float(split.eval_bytes),
        "eval/tokens": float(corpus.eval.num_predicted),
    }
    return scores if corpus.eval.masked else scores | {"eval/bytes": float(split.eval_bytes)}


def source_scores(rows: TrainingRows) -> dict[str, float]:
    """Tokens of each source, and how full their rows are."""
    tokens = {
        f"data/source/{name}/tokens": float(number)
        for name, number in zip(rows.names, rows.tokens, strict=True)
    }
    return tokens | {"data/fill_rate": rows.fill_rate}


def phase_scores(phases: Phases) -> dict[str, float]:
    """Seconds of the phases before training."""
    names = {"read": "read", "train tokenizer": "tokenizer", "tokenise": "tokenise"}
    return {f"time/{name}": phases.seconds.get(phase, 0.0) for phase, name in names.items()}


def print_mixture(rows: TrainingRows, count: int) -> None:
    """Tells on standard error what each of several sources will give to `count` rows."""
    if len(rows.names) == 1:
        return
    shares = rows.mixture.drawn(count) / count
    cells = [
        (
            name,
            quantities.count(tokens),
            "" if weight is None else quantities.number(weight),
            quantities.share(float(share)),
            f"{epochs:.3g}",
        )
        for name, tokens, weight, share, epochs in zip(
            rows.names, rows.tokens, rows.weights, shares, rows.epochs(count), strict=True
        )
    ]
    header = ("source", "tokens", "weight", "share of rows", "epochs")
    print_table(header, cells, title="Training mixture", stderr=True)
    total = sum(weight or 0 for weight in rows.weights)
    if total and abs(total - 1) > 1e-9:
        print(
            f"The weights sum to {quantities.number(total)}, not 1: each is divided by that.",
            file=sys.stderr,
        )
