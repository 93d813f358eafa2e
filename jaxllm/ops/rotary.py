"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    theta: float = 10_000.0,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates each pair (x[i], x[i + head_dim/2]) by positions · theta^(-2i/head_dim).

    The halves layout is that of Llama's published weights in the Hugging Face format. Angles
    are computed in float32, whatever the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
