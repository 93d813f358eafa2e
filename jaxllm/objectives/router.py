"""The losses that mixtures of experts add to any objective; models without experts add none."""

import jax.numpy as jnp

from jaxllm.models.config import MixtureConfig, TransformerConfig
from jaxllm.models.layers import RouterLosses
from jaxllm.objectives.objective import Batch, Metrics, Sums

_TERMS = ("load_balance", "router_z")


def router_coefficients(model: TransformerConfig) -> dict[str, float]:
    """The coefficients of the terms `load_balance` and `router_z`; empty without experts.

    A coefficient of 0 leaves its term out of the loss; it is a metric all the same.
    """
    for layer in model.unrolled:
        if isinstance(layer.mlp, MixtureConfig):
            found = (layer.mlp.load_balance_loss, layer.mlp.router_z_loss)
            return {term: value for term, value in zip(_TERMS, found, strict=True) if value}
    return {}


def router_weights(model: TransformerConfig, batch: Batch) -> Sums:
    """The weight of each term: the tokens that are not padding."""
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    return dict.fromkeys(router_coefficients(model), tokens)


def router_sums(
    model: TransformerConfig, losses: RouterLosses | None, batch: Batch
) -> tuple[Sums, Metrics]:
    """The sum of each term over the rows, and both as metrics."""
    if losses is None:
        return {}, {}
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    totals = {term: jnp.sum(getattr(losses, term)) for term in _TERMS}
    sums = {term: totals[term] for term in router_coefficients(model)}
    return sums, {term: (total, tokens) for term, total in totals.items()}
