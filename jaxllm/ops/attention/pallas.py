"""The backend `pallas`: the fused GPU kernel that comes with JAX (Pallas, Triton)."""

import functools
import importlib

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.attention.kernels import interpreting, on_each_shard, padded
from jaxllm.ops.attention.visibility import Places, Rule

MODULE = "jax.experimental.pallas.ops.gpu.attention"
# The kernel's own default block of queries and of keys, which must divide the sequence.
_BLOCK = 128


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal or full attention within segments, on GPUs; keys in the order of the queries."""
    return on_each_shard(functools.partial(_attend, rule), query, key, value, places)


def _attend(rule: Rule, query: Array, key: Array, value: Array, places: Places) -> Array:
    seq, group = query.shape[1], query.shape[2] // key.shape[2]
    # The kernel knows no groups: each query head gets a copy of its keys and values.
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    query, key, value = (padded(x, _BLOCK) for x in (query, key, value))
    out = importlib.import_module(MODULE).mha(
        query,
        key,
        value,
        segment_ids=padded(places.query_segment_ids, _BLOCK, fill=-1),
        sm_scale=rule.scale,
        causal=rule.causal,
        interpret=interpreting(),
    )
    return out[:, :seq]
