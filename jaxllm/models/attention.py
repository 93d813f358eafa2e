"""Grouped-query attention of a layer, and what every kind of attention shares."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from jaxllm.models.config import AttentionConfig, DTypes, LatentAttentionConfig
from jaxllm.models.intermediates import ATTENTION, record
from jaxllm.models.kv_cache import KeyValue, slot_positions, written
from jaxllm.models.parts import Linear, Norm
from jaxllm.ops.attention import attention, check_backend
from jaxllm.ops.attention.cached import attend_to_cache
from jaxllm.ops.attention.visibility import Places, Rule
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
        """Attends within `x`, or, with a cache, writes into it and attends to what it holds."""
        config = self.config
        batch, seq, embed = x.shape

        def heads(name: str, count: int) -> Float[Array, "batch seq heads head_dim"]:
            linear = Linear(count * config.head_dim, self.dtypes, config.input_bias, name=name)
            projected = linear(x, context.dropout_keys).reshape(batch, seq, count, config.head_dim)
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
            places = (context.positions, context.segment_ids)
            cache = KeyValue(written(cache.key, key, *places), written(cache.value, value, *places))
            mixed = attend_from(config, query, *cache, context)
        else:
            record(self, ATTENTION, queries=query, keys=key)
            mixed = attend(config, query, key, value, context)
        mixed = mixed.reshape(batch, seq, config.heads * config.head_dim)
        output = Linear(embed, self.dtypes, config.output_bias, self.zero_init, name="output")
        return output(mixed, context.dropout_keys), cache


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


def attend(
    config: AttentionConfig | LatentAttentionConfig,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    context: Context,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention among the tokens that `context` places, as a layer configures it; the sizes of
    heads are those of the arrays."""
    return attention(
        query,
        key,
        value,
        query_positions=context.positions,
        key_positions=context.positions,
        query_segment_ids=context.segment_ids,
        key_segment_ids=context.segment_ids,
        prefix=context.prefix,
        causal=config.causal,
        window=config.window,
        soft_cap=config.soft_cap,
        scale=config.scale,
        in_order=True,
        backend=config.backend,
    )


def attend_from(
    config: AttentionConfig | LatentAttentionConfig,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch kv_heads slots head_dim"],
    value: Float[Array, "batch kv_heads slots value_dim"],
    context: Context,
) -> Float[Array, "batch seq heads value_dim"]:
    """The same to what a cache holds once the tokens are written in."""
    held = slot_positions(context.positions, context.segment_ids, key.shape[2])
    # A slot that holds nothing yet is of no segment.
    places = Places(
        context.positions,
        held,
        jnp.ones_like(context.positions),
        (held >= 0).astype(jnp.int32),
        context.prefix,
    )
    rule = Rule(config.causal, config.window, config.soft_cap, config.scale, in_order=False)
    return attend_to_cache(query, key, value, places, rule)
