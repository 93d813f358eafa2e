"""Grouped-query attention of a layer, and what every kind of attention shares."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxllm.models.config import AttentionConfig, DTypes, LatentAttentionConfig
from jaxllm.models.parts import Linear, Norm
from jaxllm.ops.attention import attention, check_backend
from jaxllm.ops.products import PRODUCT
from jaxllm.ops.rotary import RotaryConfig, Rotation, rotate
from jaxllm.sharding.mesh import BATCH_AXES, constrain


class Context(NamedTuple):
    """Where each token of a batch stands; the same for every layer."""

    positions: Int[Array, "batch seq"]
    """Position within the segment, from 0."""
    segment_ids: Int[Array, "batch seq"]
    """Which document of the row a token belongs to, from 1; 0 is padding."""
    rotations: Mapping[RotaryConfig, Rotation]
    """The angles of the positions, for each configuration that a layer names."""
    prefix: Int[Array, "batch seq"] | None = None
    """Length of the beginning of the token's segment that all of it sees; None: there is none."""
    dropout_keys: Key[Array, " batch"] | None = None
    """A key a row; None: nothing is dropped."""


class KeyValue(NamedTuple):
    """Keys and values of one layer for each position, of one segment (a cache)."""

    key: Float[Array, "... keys kv_heads head_dim"]
    value: Float[Array, "... keys kv_heads head_dim"]


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    config: AttentionConfig
    dtypes: DTypes
    zero_init: bool = True
    """Whether the last matrix begins at zero."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        cache: KeyValue | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], KeyValue | None]:
        """Attends within `x`, or, with a cache, writes into it at `positions` and attends to it."""
        config = self.config
        batch, seq, embed = x.shape

        def heads(name: str, count: int) -> Float[Array, "batch seq heads head_dim"]:
            linear = Linear(count * config.head_dim, self.dtypes, config.input_bias, name=name)
            projected = linear(x).reshape(batch, seq, count, config.head_dim)
            return constrain(projected, BATCH_AXES, None, "tensor")

        def placed(name: str, count: int) -> Float[Array, "batch seq heads head_dim"]:
            projected = heads(name, count)
            if config.head_norm:
                projected = Norm(config.head_norm, self.dtypes, name=f"{name}_norm")(projected)
            if config.rotary:
                projected = rotate(projected, context.rotations[config.rotary])
                if not config.head_norm:
                    # Rotating is linear: its backward pass has no need of the product, and this is
                    # kept in the place of it. A norm needs its input, and both would be kept.
                    projected = checkpoint_name(projected, PRODUCT)
            return projected

        query, key = placed("query", config.heads), placed("key", config.kv_heads)
        value = heads("value", config.kv_heads)
        if cache is not None:
            cache = KeyValue(
                key=written(cache.key, key, context.positions),
                value=written(cache.value, value, context.positions),
            )
            key, value = cache
        mixed = attend(config, query, key, value, context, cached=cache is not None)
        mixed = mixed.reshape(batch, seq, config.heads * config.head_dim)
        output = Linear(embed, self.dtypes, config.output_bias, self.zero_init, name="output")
        return output(mixed), cache


def check_attention(
    config: AttentionConfig | LatentAttentionConfig, compute_dtype: str, *, prefix: bool
) -> None:
    """Checks, before there are any arrays, that the backend of a layer can do what it is asked.

    Args:
        config: of the layer.
        compute_dtype: of queries, keys and values.
        prefix: whether the objective shows the beginning of a segment to all of it.

    Raises:
        UserError: it cannot; the message says what it cannot and which can.
    """
    check_backend(
        config.backend,
        causal=config.causal,
        window=config.window,
        soft_cap=config.soft_cap,
        prefix=prefix,
        head_dim=config.head_dim,
        value_dim=config.value_dim,
        platform=jax.default_backend(),
        dtype=compute_dtype,
    )


def written(
    slots: Shaped[Array, "batch keys ..."],
    values: Shaped[Array, "batch seq ..."],
    positions: Int[Array, "batch seq"],
) -> Shaped[Array, "batch keys ..."]:
    """A part of a cache with `values` in the slots of their positions."""
    rows = jnp.arange(values.shape[0])[:, None]
    return slots.at[rows, positions].set(values.astype(slots.dtype))


def _cache_backend(queries: int) -> str:
    """The attention backend for a cache: kernels are for whole rows, and scores of a whole prompt
    against every slot would take memory quadratic in its length."""
    return "chunked" if queries >= 128 else "xla"


def attend(
    config: AttentionConfig | LatentAttentionConfig,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    context: Context,
    *,
    cached: bool,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention as a layer configures it.

    Args:
        config: scale, window and so on; the sizes of heads are those of the arrays.
        query: of the tokens that `context` places.
        key, value: of the same tokens, or, where `cached`, of a cache: slots that are the
            positions of segment 1.
    """
    key_positions, key_segment_ids = context.positions, context.segment_ids
    if cached:
        key_positions = jnp.broadcast_to(jnp.arange(key.shape[1]), key.shape[:2])
        key_segment_ids = jnp.ones_like(key_positions)
    return attention(
        query,
        key,
        value,
        query_positions=context.positions,
        key_positions=key_positions,
        query_segment_ids=context.segment_ids,
        key_segment_ids=key_segment_ids,
        prefix=context.prefix,
        causal=config.causal,
        window=config.window,
        soft_cap=config.soft_cap,
        scale=config.scale,
        in_order=not cached,
        backend=_cache_backend(query.shape[1]) if cached else config.backend,
    )
