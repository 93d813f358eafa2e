"""Attention to a cache, whose keys lie by head: of the one token of a step, or of a prompt."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.attention import chunked, xla
from jaxllm.ops.attention.visibility import MASKED, Places, Rule, visible

# From so many queries on, scores of all of them with all slots would be the largest arrays there
# are, and turning the cache costs little beside the products.
_MANY = 128


def attend_to_cache(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch kv_heads slots head_dim"],
    value: Float[Array, "batch kv_heads slots value_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by `rule`, as `jaxllm.ops.attention.attention` defines it; `rule.in_order` is not
    read."""
    if query.shape[1] >= _MANY:
        turned = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        return chunked.attend(query, turned[0], turned[1], places, rule)
    queries = xla.by_head(query, key.shape[1])
    scores = xla.capped(xla.einsum("bkqd,bktd->bkqt", queries, key), rule)
    mask = jnp.tile(visible(places, rule), (1, queries.shape[2] // query.shape[1], 1))[:, None]
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = xla.einsum("bkqt,bktd->bkqd", weights.astype(value.dtype), value) / total
    return xla.by_position(mixed, query).astype(query.dtype)
