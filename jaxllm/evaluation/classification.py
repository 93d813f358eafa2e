"""How well texts are classified: accuracy, macro-F1 and the confusion matrix; errors of values."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from jaxllm import trees
from jaxllm.data.labels import Labels
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.classification import (
    label_numbers,
    label_rows,
    text_losses,
    text_outputs,
)
from jaxllm.objectives.objective import Batch, Params

Counts = dict[str, Float64[np.ndarray, "..."]]
"""Sums over texts: `loss` (`objectives.classification`, unweighted), and by the kind of labels

- `single_label`: `confusion` [classes, classes], texts of the class of the row that were taken to
  be of that of the column;
- `multi_label`: `right`, `wrong` and `missed` [classes], texts that were rightly, wrongly and not
  given a class; `exact` and `texts`, those of which all was right, and all;
- `regression`: `moments` [8], Σ of 1, y, p, y², p², y·p, |y - p| and (y - p)², for values y and
  predictions p in standard units.
"""


class ClassificationEvaluator:
    """Counts over evaluation batches what a model makes of texts; compiled once."""

    def __init__(
        self,
        model: TransformerConfig,
        kind: str,
        targets: Float32[np.ndarray, "numbers outputs"],
    ) -> None:
        """Args:
        model: with a head.
        kind: of the labels.
        targets: what the numbers of labels stand for (`labels.LabelledTexts.targets`).
        """

        def counts(params: Params, batch: Batch, frozen: Params) -> dict[str, Array]:
            outputs, _ = text_outputs(model, trees.merge(params, frozen), batch)
            weights = batch["loss_weights"]
            losses = jnp.mean(text_losses(kind, targets, outputs, batch), axis=-1)
            if kind == "single_label":
                counted = _confusion(outputs, label_numbers(batch), weights)
            else:
                counted = _COUNTED[kind](outputs, label_rows(targets, batch), weights)
            return counted | {"loss": jnp.sum(weights * losses)}

        self._counts = jax.jit(counts)

    def __call__(self, params: Params, frozen: Params, batches: Iterable[Batch]) -> Counts:
        """The sums over all batches, of which there is at least one."""
        total: dict[str, Array] | None = None
        for batch in batches:
            counts = self._counts(params, batch, frozen)
            total = counts if total is None else jax.tree.map(jnp.add, total, counts)
        assert total is not None, "there are no evaluation batches"
        return {
            name: np.asarray(value, np.float64) for name, value in jax.device_get(total).items()
        }


def _confusion(
    outputs: Float[Array, "batch seq outputs"],
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
) -> dict[str, Array]:
    classes = outputs.shape[-1]
    matrix = jnp.zeros((classes, classes))
    return {"confusion": matrix.at[labels, jnp.argmax(outputs, axis=-1)].add(weights)}


def _sets(
    outputs: Float[Array, "batch seq outputs"],
    labels: Float[Array, "batch seq outputs"],
    weights: Float[Array, "batch seq"],
) -> dict[str, Array]:
    chosen, present = outputs > 0, labels > 0

    def count(texts: Array) -> Array:
        return jnp.sum(weights[..., None] * texts, axis=(0, 1))

    return {
        "right": count(chosen & present),
        "wrong": count(chosen & ~present),
        "missed": count(~chosen & present),
        "exact": jnp.sum(weights * jnp.all(chosen == present, axis=-1)),
        "texts": jnp.sum(weights),
    }


def _moments(
    outputs: Float[Array, "batch seq outputs"],
    labels: Float[Array, "batch seq outputs"],
    weights: Float[Array, "batch seq"],
) -> dict[str, Array]:
    p, y = outputs[..., 0], labels[..., 0]
    terms = jnp.stack([jnp.ones_like(y), y, p, y * y, p * p, y * p, jnp.abs(y - p), (y - p) ** 2])
    return {"moments": jnp.sum(terms * weights, axis=(1, 2))}


_COUNTED = {"multi_label": _sets, "regression": _moments}


def classification_scores(counts: Counts, labels: Labels) -> dict[str, float]:
    """Scores of the counted texts: their mean loss as `eval/loss`, and what is of their kind.

    Of `single_label` `eval/accuracy`, `eval/macro_f1`, and as `eval/majority` the accuracy of
    always naming the commonest class. Of `multi_label` `eval/accuracy` (texts of which all
    classes are right), `eval/macro_f1` and `eval/micro_f1`. Of `regression`
    `eval/mean_absolute_error` and `eval/root_mean_squared_error`, in units of the label, and
    Pearson's correlation as `eval/pearson` (not a number where predictions are all the same).
    """
    loss = {"eval/loss": float(counts["loss"]) / texts_of(counts)}
    if labels.kind == "single_label":
        confusion = counts["confusion"]
        texts = confusion.sum()
        return loss | {
            "eval/accuracy": float(np.trace(confusion) / texts),
            "eval/macro_f1": macro_f1(class_scores(counts, labels)),
            "eval/majority": float(confusion.sum(axis=1).max() / texts),
        }
    if labels.kind == "multi_label":
        right, wrong, missed = (counts[name].sum() for name in ("right", "wrong", "missed"))
        return loss | {
            "eval/accuracy": float(counts["exact"] / counts["texts"]),
            "eval/macro_f1": macro_f1(class_scores(counts, labels)),
            "eval/micro_f1": _f1(float(right), float(wrong), float(missed)),
        }
    n, y, p, yy, pp, yp, absolute, squared = map(float, counts["moments"])
    spread = math.sqrt(max(yy / n - (y / n) ** 2, 0) * max(pp / n - (p / n) ** 2, 0))
    return loss | {
        "eval/mean_absolute_error": labels.deviation * absolute / n,
        "eval/root_mean_squared_error": labels.deviation * math.sqrt(squared / n),
        "eval/pearson": (yp / n - y / n * p / n) / spread if spread > 1e-12 else math.nan,
    }


def texts_of(counts: Counts) -> float:
    """How many texts were counted."""
    if "moments" in counts:
        return float(counts["moments"][0])
    return float(counts["confusion"].sum() if "confusion" in counts else counts["texts"])


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """How well one class is told."""

    name: str
    texts: int
    """Held-out texts that are of it."""
    chosen: int
    """Those that were taken to be."""
    precision: float
    """Share of those taken to be of it that are; 0 if there are none."""
    recall: float
    """Share of those that are of it that were taken to be; 0 if there are none."""
    f1: float
    """Their harmonic mean."""


def class_scores(counts: Counts, labels: Labels) -> list[ClassScores]:
    """The scores of each class, in order; none of `regression`."""
    if labels.kind == "regression":
        return []
    if "confusion" in counts:
        confusion = counts["confusion"]
        right = np.diag(confusion)
        wrong, missed = confusion.sum(axis=0) - right, confusion.sum(axis=1) - right
    else:
        right, wrong, missed = (counts[name] for name in ("right", "wrong", "missed"))
    found = []
    for name, *three in zip(labels.names, right, wrong, missed, strict=True):
        r, w, m = map(float, three)
        precision, recall = r / max(r + w, 1), r / max(r + m, 1)
        found.append(
            ClassScores(str(name), round(r + m), round(r + w), precision, recall, _f1(r, w, m))
        )
    return found


def macro_f1(classes: Iterable[ClassScores]) -> float:
    """The mean F1 of the classes that any text has or was taken to have (as scikit-learn's)."""
    values = [scores.f1 for scores in classes if scores.texts or scores.chosen]
    return float(np.mean(values)) if values else 0.0


def told(counts: Counts, labels: Labels) -> dict[str, Any]:
    """What `classes.json` holds: the scores of each class, and the confusion matrix if there is
    one."""
    matrix = counts.get("confusion")
    return {
        "classes": [dataclasses.asdict(scores) for scores in class_scores(counts, labels)],
        "confusion": [] if matrix is None else matrix.astype(int).tolist(),
    }


def _f1(right: float, wrong: float, missed: float) -> float:
    return 2 * right / max(2 * right + wrong + missed, 1)
