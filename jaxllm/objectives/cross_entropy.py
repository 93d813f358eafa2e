"""Cross-entropy of predicted tokens, whichever they are: what objectives of text share."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.layers import RouterLosses
from jaxllm.models.transformer import output_head
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.ops.cross_entropy import cross_entropy_sums


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """Terms beside the cross-entropy."""

    z_loss: float = 0.0
    """Coefficient of log²(normaliser), which keeps the logits from drifting; 1e-4 is usual."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError("z_loss: must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError("label_smoothing: must be in [0, 1)")


class Predicted(NamedTuple):
    """What a forward pass predicts, at as many places of each row as an objective likes."""

    hidden: Float[Array, "batch places embed"]
    labels: Int[Array, "batch places"]
    """The right tokens; of no matter where the weight is 0."""
    weights: Float[Array, "batch places"]
    router: RouterLosses | None


def cross_entropy(
    term: str,
    model: TransformerConfig,
    config: CrossEntropyConfig,
    weight: Callable[[Batch], Float[Array, ""]],
    predict: Callable[[Params, Batch, RowKeys], Predicted],
) -> Objective:
    """The objective Σ w·ℓ / Σ w + z · Σ w·log²Z / Σ w over predictions of weight w.

    ℓ = -(1-ε) log p(label) - ε mean over the vocabulary of log p, with ε the label smoothing
    (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567); Z is the softmax normaliser
    (z-loss: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311). The metric `loss` is the
    plain cross-entropy in nats, whatever the options.

    Args:
        term: its name.
        model: a mixture of experts adds its router's losses.
        config: z and ε.
        weight: Σ w of a batch, from the batch alone.
        predict: `(params, batch, row_keys) -> hidden states, labels and w`, of all parameters.
    """
    coefficients = {term: 1.0}

    def weights(batch: Batch) -> Sums:
        return dict.fromkeys(coefficients, weight(batch)) | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        params = trees.merge(params, frozen)
        hidden, labels, weight, router = predict(params, batch, row_keys)
        found = cross_entropy_sums(
            hidden,
            output_head(model, params),
            labels,
            weight,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
        )
        terms = {term: found.loss}
        metrics = {"loss": (-found.log_prob, jnp.sum(weight))}
        router_terms, router_metrics = router_sums(model, router, batch)
        return terms | router_terms, metrics | router_metrics

    return Objective(coefficients | router_coefficients(model), weights, sums)
