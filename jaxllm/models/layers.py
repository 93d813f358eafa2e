"""The parts of a decoder layer: the one `Linear`, normalisation, attention and MLP."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.config import AttentionConfig, LayerConfig, MlpConfig
from jaxllm.ops.attention import attention
from jaxllm.ops.rotary import rotate
from jaxllm.sharding.mesh import BATCH_AXES, constrain


class Context(NamedTuple):
    """Where each token of a batch stands; the same for every layer."""

    positions: Int[Array, "batch seq"]
    """Position within the segment, from 0."""
    segment_ids: Int[Array, "batch seq"]
    """Which document of the row a token belongs to, from 1; 0 is padding."""


class KeyValue(NamedTuple):
    """Keys and values of one layer for each position, of one segment (a cache)."""

    key: Float[Array, "... keys kv_heads head_dim"]
    value: Float[Array, "... keys kv_heads head_dim"]


class Linear(nn.Module):
    """x @ kernel: every matrix product of the model with its parameters.

    The kernel is a matrix [in, out], float32, cast to the dtype of the input.
    """

    features: int
    zero_init: bool = False
    """Begin at zero, rather than at a truncated normal of standard deviation 1/√in."""

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        return x @ kernel.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · scale (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Computed in float32, returned in the dtype of the input.
    """

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    config: AttentionConfig

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
            projected = Linear(count * config.head_dim, name=name)(x)
            projected = projected.reshape(batch, seq, count, config.head_dim)
            return constrain(projected, BATCH_AXES, None, "tensor")

        query = rotate(heads("query", config.heads), context.positions, config.rope_theta)
        key = rotate(heads("key", config.kv_heads), context.positions, config.rope_theta)
        value = heads("value", config.kv_heads)

        key_context = context
        if cache is not None:
            rows = jnp.arange(batch)[:, None]
            cache = KeyValue(
                key=cache.key.at[rows, context.positions].set(key.astype(cache.key.dtype)),
                value=cache.value.at[rows, context.positions].set(value.astype(cache.value.dtype)),
            )
            key, value = cache
            slots = jnp.broadcast_to(jnp.arange(key.shape[1]), (batch, key.shape[1]))
            key_context = Context(positions=slots, segment_ids=jnp.ones_like(slots))
        mixed = attention(
            query,
            key,
            value,
            query_positions=context.positions,
            key_positions=key_context.positions,
            query_segment_ids=context.segment_ids,
            key_segment_ids=key_context.segment_ids,
            backend=config.backend,
        )
        mixed = mixed.reshape(batch, seq, config.heads * config.head_dim)
        return Linear(embed, zero_init=True, name="output")(mixed), cache


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    config: MlpConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        gate = Linear(self.config.width, name="gate")(x)
        up = Linear(self.config.width, name="up")(x)
        inner = constrain(nn.silu(gate) * up, BATCH_AXES, None, "tensor")
        return Linear(x.shape[-1], zero_init=True, name="down")(inner)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The last matrix of each branch begins at zero (Zhang et al. 2019, Fixup,
    https://arxiv.org/abs/1901.09321), so that a new layer is the identity. Otherwise the branches
    drown the small embeddings: docs/performance.md has the figures.
    """

    config: LayerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        cache: KeyValue | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], KeyValue | None]:
        config = self.config
        normed = RMSNorm(config.norm_eps, name="attention_norm")(x)
        mixed, cache = Attention(config.attention, name="attention")(normed, context, cache)
        x = constrain(x + mixed, BATCH_AXES)
        normed = RMSNorm(config.norm_eps, name="mlp_norm")(x)
        x = x + GatedMlp(config.mlp, name="mlp")(normed)
        return constrain(x, BATCH_AXES), cache
