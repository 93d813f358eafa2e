"""The step that anybody would write first: plain Flax, full attention scores, full logits.

What `benchmarks/train.py` compares with beside the peers; nothing here is meant to be fast.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Layer(nn.Module):
    """A Llama layer."""

    heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        batch, seq, width = x.shape
        head_dim = width // self.heads
        normed = nn.RMSNorm()(x)
        query, key, value = (
            nn.Dense(width, use_bias=False)(normed).reshape(batch, seq, self.heads, head_dim)
            for _ in range(3)
        )
        query, key = rotated(query), rotated(key)
        scores = jnp.einsum("bshd,bthd->bhst", query, key) / head_dim**0.5
        scores = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), scores, -1e30)
        mixed = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), value)
        x = x + nn.Dense(width, use_bias=False)(mixed.reshape(batch, seq, width))
        normed = nn.RMSNorm()(x)
        gate = nn.silu(nn.Dense(self.mlp_width, use_bias=False)(normed))
        up = nn.Dense(self.mlp_width, use_bias=False)(normed)
        return x + nn.Dense(width, use_bias=False)(gate * up)


class Model(nn.Module):
    """A Llama with tied embeddings; it returns logits."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        embed = nn.Embed(self.vocab, self.width)
        x = embed(tokens)
        for _ in range(self.layers):
            x = Layer(self.heads, self.mlp_width)(x)
        return embed.attend(nn.RMSNorm()(x))


def rotated(
    x: Float[Array, "batch seq heads head_dim"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def compiled_step(
    model: Model, tokens: Int[Array, "batch seq"]
) -> tuple[jax.stages.Compiled, tuple]:
    """`(params, opt_state) -> (params, opt_state)`, compiled, and what it begins with."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))

    def loss(params: dict) -> Float[Array, ""]:
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    def step(params: dict, state: optax.OptState) -> tuple[dict, optax.OptState]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    initialise: Callable = jax.jit(model.init)
    params = initialise(jax.random.key(0), tokens)["params"]
    begin = (params, optimizer.init(params))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*begin).compile(), begin
