"""Sampling: which tokens are kept, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.sampling import keep_top_k, keep_top_p, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)
LOGITS = jnp.log(PROBABILITIES)[None]


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def draws(count, logits=LOGITS, **options):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(sample(keys, jnp.tile(logits, (count, 1)), **options))


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (2, [1, 3]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_likeliest(k, expected):
    assert kept(keep_top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties():
    assert kept(keep_top_k(jnp.array([[1.0, 0.0, 1.0, 1.0]]), 2)) == [0, 2, 3]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-6, [1]),
        (0.0, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    assert kept(keep_top_p(LOGITS, p)) == expected


def test_top_p_of_equal_logits_keeps_just_enough():
    assert len(kept(keep_top_p(jnp.zeros((1, 4)), 0.6))) == 3


def test_what_is_kept_is_unchanged():
    for result in (keep_top_k(LOGITS, 2), keep_top_p(LOGITS, 0.5)):
        np.testing.assert_array_equal(result[0, [1, 3]], LOGITS[0, [1, 3]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature):
    count = 4000
    found = np.bincount(draws(count, temperature=temperature), minlength=5) / count
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    # Five standard errors.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_top_p_counts_the_tempered_probabilities_that_top_k_left():
    # Of the two likeliest, 0.4 and 0.25, the first alone is 0.615 of what is left.
    assert set(draws(300, temperature=1.0, top_k=2, top_p=0.6)) == {1}
    assert set(draws(300, temperature=1.0, top_k=2, top_p=0.63)) == {1, 3}
    # At temperature 1/2 it is 0.72.
    assert set(draws(300, temperature=0.5, top_k=2, top_p=0.7)) == {1}


def test_temperature_0_takes_the_likeliest_whatever_the_key():
    assert set(draws(50, temperature=0.0)) == {1}
    assert set(draws(50, temperature=jnp.float32(0.0), top_k=3, top_p=0.9)) == {1}


def test_a_key_decides_its_row_alone():
    keys = jax.random.split(jax.random.key(0), 6)
    logits = jax.random.normal(jax.random.key(1), (6, 30))
    together = sample(keys, logits, temperature=1.0)
    alone = [int(sample(keys[i][None], logits[i][None], temperature=1.0)[0]) for i in range(6)]
    assert together.tolist() == alone
    assert together.dtype == jnp.int32
    assert len(set(draws(20, jnp.zeros((1, 1000)), temperature=1.0))) > 10
