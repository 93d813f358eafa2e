"""A checksum of an array that does not depend on how it lies on devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def checksum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """32 bits that depend on every bit of an array and on its place.

    Any one element changed changes it; other changes, swapped elements included, do but for one in
    2³². The sum of the elements, each mixed with its index by the finaliser of MurmurHash3
    (https://github.com/aappleby/smhasher), modulo 2³²: no element waits for another.
    """
    bits = _bits(array)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # no reshape, which could copy the array
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = bits + index * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _bits(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = min(array.dtype.itemsize, 4)  # eight bytes become two elements
    return jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32)
