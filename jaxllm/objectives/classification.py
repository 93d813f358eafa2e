"""What a text is: cross-entropy over classes, or over each class by itself, or squared error.

A batch is as for `next_token`, but that the `targets` of weight 1, one for each text, at its last
token, are numbers of labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.head import head_outputs
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights

TERM = "classification"

_BALANCED = "balanced"


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """The loss of a text's label."""

    class_weights: str = ""
    """What a text of each class counts in the loss, `CLASS:WEIGHT` separated by commas, others 1;
    or `balanced`: texts / (classes · texts of the class), so that all classes count the same.
    Empty: all texts do."""

    def __post_init__(self) -> None:
        for entry in self._entries():
            name, colon, number = entry.rpartition(":")
            try:
                good = bool(name and colon) and 0 < float(number) < np.inf
            except ValueError:
                good = False
            if not good:
                raise ValueError(
                    f"class_weights: {entry!r} is not CLASS:WEIGHT with a positive number"
                )

    def _entries(self) -> list[str]:
        if self.class_weights.strip() == _BALANCED:
            return []
        return [entry.strip() for entry in self.class_weights.split(",") if entry.strip()]

    def weights(
        self, names: Sequence[int | str], counts: Sequence[int], texts: int
    ) -> Float32[np.ndarray, " classes"]:
        """The weight of each class.

        Args:
            names: of the classes, in order.
            counts: how many training texts have each.
            texts: how many training texts there are.

        Raises:
            UserError: a class is named that there is not.
        """
        if self.class_weights.strip() == _BALANCED:
            return (texts / (len(names) * np.array(counts))).astype(np.float32)
        given = dict(entry.rsplit(":", 1) for entry in self._entries())
        known = [str(name) for name in names]
        for name in given:
            if name not in known:
                raise UserError(
                    f"config.classify.class_weights: {name!r} is no class of the training texts; "
                    f"they are of {', '.join(known) or 'none, but numbers'}."
                )
        return np.array([float(given.get(name, 1.0)) for name in known], np.float32)


def classification(
    model: TransformerConfig,
    kind: str,
    targets: Float32[np.ndarray, "numbers outputs"],
    class_weights: Float32[np.ndarray, " classes"],
) -> Objective:
    """The mean loss of a text's label, each text weighed.

    - `single_label`: -w_c log p(c) of its class c, over Σ w_c.
    - `multi_label`: Σ_c w_c of the binary cross-entropy of each class c, over Σ Σ_c w_c.
    - `regression`: the squared error of the value, in units of the training values' variance.

    The metric `loss` is the same without weights, in nats a text, or a class of a text.

    Args:
        model: with a head of so many outputs.
        kind: as above.
        targets: what each number of a label stands for (`labels.LabelledTexts.targets`).
        class_weights: w_c; of `regression` empty.
    """

    def counted(batch: Batch) -> Float[Array, "batch seq"]:
        """What the text that ends here counts; 0 elsewhere."""
        weights = batch["loss_weights"]
        if kind == "single_label":
            return weights * jnp.asarray(class_weights)[label_numbers(batch)]
        return weights * (class_weights.sum() if kind == "multi_label" else 1.0)

    def weights(batch: Batch) -> Sums:
        return {TERM: jnp.sum(counted(batch))} | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        params = trees.merge(params, frozen)
        outputs, output = text_outputs(model, params, batch, row_keys)
        found = batch["loss_weights"]
        losses = text_losses(kind, targets, outputs, batch)
        if kind == "multi_label":
            total = jnp.sum(found[..., None] * class_weights * losses)
        else:
            total = jnp.sum(counted(batch) * losses[..., 0])
        metrics: Metrics = {"loss": (jnp.sum(found * jnp.mean(losses, axis=-1)), jnp.sum(found))}
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return {TERM: total} | router_terms, metrics | router_metrics

    return Objective({TERM: 1.0} | router_coefficients(model), weights, sums)


def text_outputs(
    model: TransformerConfig, params: Mapping, batch: Batch, row_keys: RowKeys = None
) -> tuple[Float[Array, "batch seq outputs"], Output]:
    """What the head gives up to each token, and the forward pass that it read."""
    output = Transformer(model).apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        dropout_keys=row_keys,
    )
    assert isinstance(output, Output)
    return head_outputs(model, params, output.hidden, batch["positions"]), output


def text_losses(
    kind: str,
    targets: Float32[np.ndarray, "numbers outputs"],
    outputs: Float[Array, "batch seq outputs"],
    batch: Batch,
) -> Float[Array, "batch seq losses"]:
    """The losses of what the head gives: one, but one of each class where there can be several."""
    if kind == "single_label":  # the number of a label is that of its class
        numbers = label_numbers(batch)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, numbers)[..., None]
    labels = label_rows(targets, batch)
    if kind == "multi_label":
        return optax.sigmoid_binary_cross_entropy(outputs, labels)
    return jnp.square(outputs - labels)


def label_rows(
    targets: Float32[np.ndarray, "numbers outputs"], batch: Batch
) -> Float32[Array, "batch seq outputs"]:
    """What the head is to give where a text ends; of no matter elsewhere."""
    return jnp.asarray(targets)[label_numbers(batch)]


def label_numbers(batch: Batch) -> Int[Array, "batch seq"]:
    """The number of the label of the text that ends here; 0 elsewhere."""
    return jnp.where(batch["loss_weights"] > 0, batch["targets"], 0)
