"""Checksums of arrays: every bit counts, and where it stands."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.checksum import checksum


def test_a_checksum_sees_places():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    sums = [
        array,
        array.at[0, 0].set(array[0, 1]).at[0, 1].set(array[0, 0]),
        array.at[0, 0].set(array[7, 0]).at[7, 0].set(array[0, 0]),
        array.T,
        array[::-1],
        jnp.roll(array, 1, axis=1),
        array.at[3, 4].add(1e-6),
        array.at[3, 4].multiply(-1),
    ]
    assert len({int(jax.jit(checksum)(a)) for a in sums}) == len(sums)


def test_zeros_of_different_lengths_and_single_bits_have_their_own_checksums():
    bits = [np.zeros(64, np.uint32) for _ in range(65)]
    for number in range(64):
        bits[number][number] = 1 << (number % 32)
    assert len({int(checksum(jnp.asarray(b))) for b in bits}) == len(bits)
    assert len({int(checksum(jnp.zeros(size))) for size in range(1, 9)}) == 8
