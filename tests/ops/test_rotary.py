"""Rotary positions: what makes them relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.ops.rotary import RopeScaling, RotaryConfig, frequencies, rotate, rotation

HEAD_DIM = 8


def vector(seed):
    return jax.random.normal(jax.random.key(seed), (1, 1, 1, HEAD_DIM))


def at(x, position, theta=10_000.0):
    config = RotaryConfig(x.shape[-1], theta)
    return rotate(x, rotation(jnp.full((1, 1), position, jnp.int32), config))[0, 0, 0]


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


def scaled(**scaling):
    """The frequencies over those without scaling, of 8 pairs from 1 to 1/1000 radians."""
    theta = 1000.0 ** (8 / 7)
    plain = frequencies(RotaryConfig(16, theta))
    return frequencies(RotaryConfig(16, theta, RopeScaling(**scaling))) / plain


def test_linear_scaling_divides_every_frequency():
    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), np.full(8, 0.25))


def test_llama3_scaling_leaves_fast_frequencies_and_divides_slow_ones():
    # Over 128 positions the pairs turn 128/2π · 10^(-3i/7) = 20.4, 7.6, 2.8, 1.06, 0.39, … times.
    found = scaled(kind="llama3", factor=8.0, original_length=128)
    np.testing.assert_allclose(found[:2], 1)
    np.testing.assert_allclose(found[4:], 1 / 8)
    turns = 128 / (2 * np.pi) * 10 ** (-3 * np.arange(2, 4) / 7)
    kept = (turns - 1) / (4 - 1)
    np.testing.assert_allclose(found[2:4], kept + (1 - kept) / 8)


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_stretches_the_vectors():
    found = scaled(kind="yarn", factor=4.0, original_length=128, beta_fast=8.0, beta_slow=1.0)
    assert found[0] == 1
    np.testing.assert_allclose(found[-1], 0.25)
    assert (np.diff(found) <= 0).all()
    for factor, expected in ((0.0, 0.1 * np.log(4) + 1), (1.5, 1.5)):
        scaling = RopeScaling("yarn", factor=4.0, attention_factor=factor)
        turned = rotate(vector(0), rotation(jnp.full((1, 1), 9), RotaryConfig(8, scaling=scaling)))
        length = np.linalg.norm(turned) / np.linalg.norm(vector(0))
        np.testing.assert_allclose(length, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dynamic"}, r"kind: must be one of none, linear, llama3, yarn"),
        ({"factor": 0.5}, r"factor: must be at least 1"),
        ({"low_frequency": 4.0}, r"low_frequency: must be positive, and less than high_frequency"),
        ({"original_length": 0}, r"original_length: must be positive"),
    ],
)
def test_a_wrong_scaling_is_named(changes, message):
    with pytest.raises(UserError, match=rf"config\.model\.rope_scaling\.{message}"):
        from_dict(RopeScaling, changes, "model.rope_scaling")
