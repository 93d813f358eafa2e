"""Attention: one function, with named backends that all honour the same arguments.

Which key a query may see follows from positions and segments alone: the same segment, and a
position that is not later. That one rule covers causal training, packed documents (positions
restart with each segment), padding (segment 0) and decoding from a cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a query without any visible key gives numbers rather than NaN; its exponential
# underflows to exactly 0 beside any real score, so that nothing leaks.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    *,
    query_positions: Int[Array, "batch seq"],
    key_positions: Int[Array, "batch keys"],
    query_segment_ids: Int[Array, "batch seq"],
    key_segment_ids: Int[Array, "batch keys"],
    backend: str = "xla",
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention within segments, softmax(q kᵀ / √head_dim) v.

    Grouped heads: query head h reads key head h // (heads / kv_heads). Scores and softmax are
    float32; the result has the dtype of `query`.

    Args:
        query, key, value: projected and rotated inputs; `kv_heads` divides `heads`.
        query_positions, key_positions: a query sees keys at positions up to its own.
        query_segment_ids, key_segment_ids: a query sees keys of its own segment only.
        backend: one of `BACKENDS`.
    """
    mask = visible(query_positions, key_positions, query_segment_ids, key_segment_ids)
    return BACKENDS[backend](query, key, value, mask)


def visible(
    query_positions: Int[Array, "batch seq"],
    key_positions: Int[Array, "batch keys"],
    query_segment_ids: Int[Array, "batch seq"],
    key_segment_ids: Int[Array, "batch keys"],
) -> Bool[Array, "batch seq keys"]:
    """Which keys each query may see: those of its segment that are not in its future."""
    past = query_positions[:, :, None] >= key_positions[:, None, :]
    same = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return past & same


def _xla(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch seq keys"],
) -> Float[Array, "batch seq heads head_dim"]:
    """The reference: scores of every pair, in plain operations that XLA fuses."""
    batch, seq, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", grouped, key, preferred_element_type=jnp.float32) * (
        head_dim**-0.5
    )
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgst,btkd->bskgd", weights, value)
    return mixed.reshape(query.shape).astype(query.dtype)


BACKENDS: dict[str, Callable[..., Array]] = {"xla": _xla}
