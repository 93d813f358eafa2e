"""Next-token prediction: cross-entropy with optional label smoothing and z-loss."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Transformer, output_matrix
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, Sums
from jaxllm.ops.vocabulary import token_log_probs


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
    """The objective L = Σ w·ℓ / Σ w + z · Σ w·log²Z / Σ w over the batch's `loss_weights` w.

    ℓ = -(1-ε) log p(target) - ε mean over the vocabulary of log p, with ε the label smoothing
    (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567); Z is the softmax normaliser
    (z-loss: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311). The metric `loss` is the
    plain cross-entropy in nats, whatever the options.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` int32 [batch, seq] and
    `loss_weights` float32 [batch, seq].
    """
    coefficients = {"next_token": 1.0}
    if config.z_loss:
        coefficients["z_loss"] = config.z_loss

    def weights(batch: Batch) -> Sums:
        return dict.fromkeys(coefficients, jnp.sum(batch["loss_weights"]))

    def sums(params: Params, batch: Batch, frozen: Params, rng: Array) -> tuple[Sums, Metrics]:
        del rng
        params = trees.merge(params, frozen)
        hidden, _ = Transformer(model).apply(
            {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        scores = token_log_probs(hidden, output_matrix(params), batch["targets"])
        weight = batch["loss_weights"]
        smoothing = config.label_smoothing
        loss = -(1 - smoothing) * scores.log_prob - smoothing * scores.mean_log_prob
        terms = {"next_token": jnp.sum(weight * loss)}
        if config.z_loss:
            terms["z_loss"] = jnp.sum(weight * jnp.square(scores.log_sum_exp))
        metrics = {"loss": (-jnp.sum(weight * scores.log_prob), jnp.sum(weight))}
        return terms, metrics

    return Objective(coefficients, weights, sums)
