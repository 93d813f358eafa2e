"""Cross-entropy of predicted tokens, whichever they are: what objectives of text share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.layers import RouterLosses
from jaxllm.models.transformer import output_head
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, Rngs, Sums
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.ops.vocabulary import token_log_probs


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
    weight: Callable[[Batch], Float[Array, ""]],
    predict: Callable[[Params, Batch, Rngs], Predicted],
    *,
    z_loss: float,
    label_smoothing: float,
) -> Objective:
    """The objective Σ w·ℓ / Σ w + z · Σ w·log²Z / Σ w over predictions of weight w.

    ℓ = -(1-ε) log p(label) - ε mean over the vocabulary of log p, with ε the label smoothing
    (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567); Z is the softmax normaliser
    (z-loss: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311). The metric `loss` is the
    plain cross-entropy in nats, whatever the options.

    Args:
        term: the name of its first term.
        model: a mixture of experts adds its router's losses.
        weight: Σ w of a batch, from the batch alone.
        predict: `(params, batch, rngs) -> hidden states, labels and w`, of all parameters.
        z_loss: coefficient z.
        label_smoothing: ε.
    """
    coefficients = {term: 1.0} | ({"z_loss": z_loss} if z_loss else {})

    def weights(batch: Batch) -> Sums:
        return dict.fromkeys(coefficients, weight(batch)) | router_weights(model, batch)

    def sums(params: Params, batch: Batch, frozen: Params, rngs: Rngs) -> tuple[Sums, Metrics]:
        params = trees.merge(params, frozen)
        hidden, labels, weight, router = predict(params, batch, rngs)
        scores = token_log_probs(hidden, output_head(model, params), labels)
        loss = -(1 - label_smoothing) * scores.log_prob - label_smoothing * scores.mean_log_prob
        terms = {term: jnp.sum(weight * loss)}
        if z_loss:
            terms["z_loss"] = jnp.sum(weight * jnp.square(scores.log_sum_exp))
        metrics = {"loss": (-jnp.sum(weight * scores.log_prob), jnp.sum(weight))}
        router_terms, router_metrics = router_sums(model, router, batch)
        return terms | router_terms, metrics | router_metrics

    return Objective(coefficients | router_coefficients(model), weights, sums)
