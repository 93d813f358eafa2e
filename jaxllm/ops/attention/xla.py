"""The backend `xla`: the reference, scores of every pair in plain operations that XLA fuses.

The backward pass computes probabilities again from the log-sum-exp: they are the largest arrays
of a layer, and keeping them is not faster (docs/attention.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxllm.ops.attention.visibility import MASKED, Places, Rule, visible, visible_range
from jaxllm.ops.products import PRODUCT

# Products are in the dtype of their operands and accumulate in float32.
einsum: Callable[..., Array] = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by `rule`; memory is quadratic in the sequence."""
    return _forward(query, key, value, places, rule)[0]


def _forward(query: Array, key: Array, value: Array, places: Places, rule: Rule) -> tuple:
    queries = by_head(query, key.shape[2])
    scores = capped(einsum("bkqd,btkd->bkqt", queries, key), rule)
    scores = jnp.where(_mask(places, rule, queries.shape[2]), scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = einsum("bkqt,btkd->bkqd", weights.astype(value.dtype), value) / total
    out = by_position(mixed, query).astype(query.dtype)
    # Kept where layers are computed again, which would attend again otherwise.
    out = checkpoint_name(out, PRODUCT)
    log_sum_exp = checkpoint_name(top + jnp.log(total), PRODUCT)
    return out, (query, key, value, places, out, log_sum_exp)


def _backward(rule: Rule, saved: tuple, d_out: Array) -> tuple[Any, ...]:
    query, key, value, places, out, log_sum_exp = saved
    queries, d_out, out = (
        by_head(x, key.shape[2]) for x in (query, d_out.astype(query.dtype), out)
    )
    scores = capped(einsum("bkqd,btkd->bkqt", queries, key), rule)
    masked = jnp.where(_mask(places, rule, queries.shape[2]), scores, MASKED)
    weights = jnp.exp(masked - log_sum_exp)
    d_weights = einsum("bkqd,btkd->bkqt", d_out, value)
    d_scores = weights * (d_weights - mean_gradient(d_out, out)) * slope(scores, rule)
    d_scores, weights = d_scores.astype(key.dtype), weights.astype(value.dtype)
    d_query = by_position(einsum("bkqt,btkd->bkqd", d_scores, key), query)
    d_key = einsum("bkqt,bkqd->btkd", d_scores, queries)
    d_value = einsum("bkqt,bkqd->btkd", weights, d_out)
    gradients = zip((d_query, d_key, d_value), (query, key, value), strict=True)
    return *(gradient.astype(x.dtype) for gradient, x in gradients), None


attend.defvjp(_forward, _backward)


def capped(products: Float[Array, "..."], rule: Rule) -> Float[Array, "..."]:
    """Scores of the products q kᵀ: scaled, then soft-capped (Gemma 2, arXiv:2408.00118)."""
    scores = products * rule.scale
    return jnp.tanh(scores / rule.soft_cap) * rule.soft_cap if rule.soft_cap else scores


def slope(scores: Float[Array, "..."], rule: Rule) -> Float[Array, "..."] | float:
    """The derivative of `capped`, as a function of its result."""
    return (1 - jnp.square(scores / rule.soft_cap)) * rule.scale if rule.soft_cap else rule.scale


def mean_gradient(
    d_out: Float[Array, "*queries value_dim"], out: Float[Array, "*queries value_dim"]
) -> Float[Array, "*queries 1"]:
    """The gradient of a query's weights averaged by those weights, which is d_out · out."""
    product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    return jnp.sum(product, axis=-1, keepdims=True)


def by_head(x: Array, kv_heads: int) -> Float[Array, "batch kv_heads group_seq head_dim"]:
    """[batch, seq, heads, ...] by key head: its queries, a group at each position, in one row.

    A dimension more for the group costs a fifth of the time on a CPU, even where it is 1.
    """
    batch, seq, _, width = x.shape
    grouped = x.reshape(batch, seq, kv_heads, -1, width)
    return jnp.moveaxis(grouped, 1, 3).reshape(batch, kv_heads, -1, width)


def by_position(
    x: Float[Array, "batch kv_heads group_seq width"], query: Array
) -> Float[Array, "batch seq heads width"]:
    """The inverse of `by_head`."""
    batch, seq, heads, _ = query.shape
    grouped = x.reshape(batch, x.shape[1], -1, seq, x.shape[-1])
    return jnp.moveaxis(grouped, 3, 1).reshape(batch, seq, heads, x.shape[-1])


def _mask(places: Places, rule: Rule, group_seq: int) -> Bool[Array, "batch 1 group_seq keys"]:
    if rule.in_order:
        first, last = visible_range(places, rule)
        index = jnp.arange(first.shape[1])
        mask = (index >= first[..., None]) & (index <= last[..., None])
    else:
        mask = visible(places, rule)
    return jnp.tile(mask, (1, group_seq // mask.shape[1], 1))[:, None]
