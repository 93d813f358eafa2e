"""The backend `cudnn`: the fused kernels of NVIDIA's cuDNN, by `jax.nn.dot_product_attention`.

cuDNN knows no segment ids; they go in as a mask of every pair, one for all heads, in the dtype of
the query. That is quadratic in the sequence, but small beside scores: those are never stored.
"""

import functools

import jax
from jaxtyping import Array, Float

from jaxllm.ops.attention.kernels import on_each_shard
from jaxllm.ops.attention.visibility import Places, Rule, visible


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by `rule`, on NVIDIA GPUs."""
    return on_each_shard(functools.partial(_attend, rule), query, key, value, places)


def _attend(rule: Rule, query: Array, key: Array, value: Array, places: Places) -> Array:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=visible(places, rule)[:, None],
        scale=rule.scale,
        # The mask says this too; said here, the kernel leaves out what lies above the diagonal.
        is_causal=rule.causal and rule.in_order and places.prefix is None,
        implementation="cudnn",
    )
