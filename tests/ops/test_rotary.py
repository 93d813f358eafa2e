"""Rotary positions: what makes them relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.rotary import rotate

HEAD_DIM = 8


def vector(seed):
    return jax.random.normal(jax.random.key(seed), (1, 1, 1, HEAD_DIM))


def at(x, position, theta=10_000.0):
    return rotate(x, jnp.full((1, 1), position, jnp.int32), theta)[0, 0, 0]


def test_scores_depend_on_the_distance_alone():
    query, key = vector(0), vector(1)
    scores = {
        shift: [float(at(query, 5 + shift) @ at(key, d + shift)) for d in range(6)]
        for shift in (0, 1, 100)
    }
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    np.testing.assert_allclose(scores[100], scores[0], atol=1e-4)
    assert np.ptp(scores[0]) > 0.1


@pytest.mark.parametrize("position", [1, 17, 4000])
def test_length_is_kept(position):
    x = vector(0)
    np.testing.assert_allclose(np.linalg.norm(at(x, position)), np.linalg.norm(x), rtol=1e-5)
    assert np.abs(at(x, position) - x[0, 0, 0]).max() > 0.1


def test_position_0_is_the_identity():
    x = vector(0)
    np.testing.assert_array_equal(at(x, 0), x[0, 0, 0])


def test_pairs_are_the_two_halves_and_turn_by_their_frequencies():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 1].set(1.0)  # the second of two pairs: (x[1], x[3])
    angle = 3 * 100.0 ** (-1 / 2)
    np.testing.assert_allclose(
        at(x, 3, theta=100.0), [0, np.cos(angle), 0, np.sin(angle)], atol=1e-6
    )


def test_bfloat16_comes_back_as_bfloat16_with_angles_in_float32():
    # In bfloat16 position 257 would be read as 256.
    wide = at(vector(0), 257)
    narrow = at(vector(0).astype(jnp.bfloat16), 257)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), wide, atol=0.03)
