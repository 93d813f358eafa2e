"""Next-token prediction: cross-entropy with optional label smoothing and z-loss."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig, Predicted, cross_entropy
from jaxllm.objectives.objective import Batch, Objective, Params, RowKeys


def next_token(model: TransformerConfig, config: CrossEntropyConfig) -> Objective:
    """The cross-entropy of each token's successor, over the batch's `loss_weights`.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` int32 [batch, seq] and
    `loss_weights` float32 [batch, seq].
    """

    def weight(batch: Batch) -> Float[Array, ""]:
        return jnp.sum(batch["loss_weights"])

    def predict(params: Params, batch: Batch, row_keys: RowKeys) -> Predicted:
        output = Transformer(model).apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            dropout_keys=row_keys,
        )
        assert isinstance(output, Output)
        return Predicted(output.hidden, batch["targets"], batch["loss_weights"], output.router)

    return cross_entropy("next_token", model, config, weight, predict)
