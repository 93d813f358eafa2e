"""The backend `splash`: the fused TPU kernel that comes with JAX (Pallas, "sparse flash")."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.attention.kernels import interpreting, on_each_shard, padded
from jaxllm.ops.attention.visibility import Places, Rule

MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"
# Longest first: blocks must divide the (padded) sequence, and 128 is the width of a vector.
_BLOCKS = (512, 256, 128)


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by `rule` without a prefix, on TPUs; keys in the order of the queries."""
    return on_each_shard(functools.partial(_attend, rule), query, key, value, places)


def _attend(rule: Rule, query: Array, key: Array, value: Array, places: Places) -> Array:
    splash = importlib.import_module(MODULE)
    seq, heads = query.shape[1:3]
    query = (query * rule.scale).astype(query.dtype)  # the kernel does not scale
    query, key, value = (jnp.swapaxes(padded(x, _BLOCKS[-1]), 1, 2) for x in (query, key, value))
    length = query.shape[2]
    block = next(block for block in _BLOCKS if length % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    # Every position is in the mask's row itself, so that none sees nothing.
    reach = rule.window - 1 if rule.window else length
    mask = splash.LocalMask((length, length), (reach, 0 if rule.causal else reach), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=rule.soft_cap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpreting(),
    )
    segment_ids = padded(places.query_segment_ids, _BLOCKS[-1], fill=-1)

    def one_row(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        return kernel(query, key, value, splash.SegmentIds(segment_ids, segment_ids))

    out = jax.vmap(one_row)(query, key, value, segment_ids)
    return jnp.swapaxes(out, 1, 2)[:, :seq]
