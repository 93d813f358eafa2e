"""Next-token prediction: cross-entropy with optional label smoothing and z-loss."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.cross_entropy import Predicted, cross_entropy
from jaxllm.objectives.objective import Batch, Objective, Params, Rngs


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
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


def next_token(model: TransformerConfig, config: NextTokenConfig) -> Objective:
    """The cross-entropy of each token's successor, over the batch's `loss_weights`.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` int32 [batch, seq] and
    `loss_weights` float32 [batch, seq].
    """

    def weight(batch: Batch) -> Float[Array, ""]:
        return jnp.sum(batch["loss_weights"])

    def predict(params: Params, batch: Batch, rngs: Rngs) -> Predicted:
        output = Transformer(model).apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            dropout_keys=rngs,
        )
        assert isinstance(output, Output)
        return Predicted(output.hidden, batch["targets"], batch["loss_weights"], output.router)

    return cross_entropy(
        "next_token",
        model,
        weight,
        predict,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
    )
