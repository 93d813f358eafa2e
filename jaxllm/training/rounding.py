"""Stochastic rounding: what lies between two bfloat16 numbers becomes one of them by chance."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Key


def stochastic_round(tree: Any, like: Any, key: Key[Array, ""]) -> Any:
    """Each leaf of `tree` in the dtype of its leaf in `like`: the same, or bfloat16.

    A float32 value goes to the upper or lower bfloat16 neighbour with the probability of its
    nearness to each, so that the mean is the value itself (Gupta et al. 2015,
    https://arxiv.org/abs/1502.02551). Rounding to the nearest would undo every change of less than
    1/512 of a value, and a slow average or a small update would never move. The same key rounds
    alike on every mesh.
    """
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        leaf if leaf.dtype == other.dtype else _round(leaf, jax.random.fold_in(key, index))
        for index, (leaf, other) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def _round(value: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    # bfloat16 is the upper half of float32: noise in the lower half carries into the upper one
    # with the probability wanted, whatever the sign.
    noise = jax.random.bits(key, value.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    # A carry would make a number of NaN.
    return jnp.where(jnp.isfinite(value), rounded, value).astype(jnp.bfloat16)
