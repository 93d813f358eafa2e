"""Prefix language modelling: the beginning of a document is seen both ways, the rest predicted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig, Predicted, cross_entropy
from jaxllm.objectives.objective import Batch, Objective, Params, RowKeys


def prefix_lm(model: TransformerConfig, config: CrossEntropyConfig, fraction: float) -> Objective:
    """The loss of `next_token` on what follows the prefix of each document
    (Liu et al. 2018, https://arxiv.org/abs/1801.10198; Raffel et al. 2020, section 3.2.1,
    https://arxiv.org/abs/1910.10683).

    The first `fraction` of a document's tokens are seen by all of the document; what
    follows is causal. Only targets that lie after the prefix, and so are seen by nobody who
    predicts them, keep their `loss_weights`. Nothing is drawn: a fraction of 0 is `next_token`.

    A batch holds what it holds for `next_token`.
    """

    def weight(batch: Batch) -> Float[Array, ""]:
        return jnp.sum(_weights(batch, prefix_lengths(batch, fraction)))

    def predict(params: Params, batch: Batch, row_keys: RowKeys) -> Predicted:
        prefix = prefix_lengths(batch, fraction)
        output = Transformer(model).apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            prefix=prefix,
            dropout_keys=row_keys,
        )
        assert isinstance(output, Output)
        weights = _weights(batch, prefix)
        return Predicted(output.hidden, batch["targets"], weights, output.router)

    return cross_entropy("prefix_lm", model, config, weight, predict)


def prefix_lengths(batch: Batch, fraction: float) -> Int[Array, "batch seq"]:
    """The length of the prefix of each token's segment: of its tokens in the row, rounded down."""
    segment_ids = batch["segment_ids"]
    places = jnp.arange(segment_ids.shape[1])
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    # Segments are runs: the nearest last place of one, looked for to the right, is the own one.
    last = jnp.where(segment_ids != following, places, len(places))
    last = jax.lax.cummin(last, axis=1, reverse=True)
    lengths = batch["positions"] + last - places + 1
    return jnp.floor(fraction * lengths).astype(jnp.int32)


def _weights(batch: Batch, prefix: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    # The last token of the prefix is the first that may not see its own target.
    return jnp.where(batch["positions"] >= prefix - 1, batch["loss_weights"], 0.0)
