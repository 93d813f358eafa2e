"""Sampling: which tokens are kept, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.sampling import Limits, limited, penalised, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)
LOGITS = jnp.log(PROBABILITIES)[None]


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def within(logits, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    limits = Limits(
        jnp.full(rows, top_k),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    )
    return limited(logits, limits)


def draws(count, logits=LOGITS, temperature=1.0, top_k=0, top_p=1.0):
    keys = jax.random.split(jax.random.key(0), count)
    limits = Limits(jnp.full(count, top_k), jnp.full(count, top_p), jnp.zeros(count))
    rows = jnp.tile(logits, (count, 1))
    return np.asarray(sample(keys, rows, jnp.full(count, temperature), limits))


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (2, [1, 3]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_likeliest(k, expected):
    assert kept(within(LOGITS, top_k=k)) == expected


def test_top_k_keeps_ties():
    assert kept(within(jnp.array([[1.0, 0.0, 1.0, 1.0]]), top_k=2)) == [0, 2, 3]


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
    assert kept(within(LOGITS, top_p=p)) == expected


def test_top_p_of_equal_logits_keeps_just_enough():
    assert len(kept(within(jnp.zeros((1, 4)), top_p=0.6))) == 3


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [0, 1, 2, 3, 4]), (0.26, [1, 3, 4]), (0.55, [1, 3]), (1.0, [1])]
)
def test_min_p_keeps_what_is_that_share_of_the_likeliest(p, expected):
    assert kept(within(LOGITS, min_p=p)) == expected


def test_limits_are_each_rows_own_and_all_at_once():
    rows = jnp.tile(LOGITS, (4, 1))
    limits = Limits(
        jnp.array([0, 2, 3, 4]),
        jnp.array([1.0, 1.0, 0.7, 1.0], jnp.float32),
        jnp.array([0.0, 0.0, 0.0, 0.55], jnp.float32),
    )
    found = [np.flatnonzero(row).tolist() for row in np.isfinite(limited(rows, limits))]
    # 0.4 and 0.25 are 0.76 of what the three likeliest have.
    assert found == [[0, 1, 2, 3, 4], [1, 3], [1, 3], [1, 3]]


def test_a_penalty_moves_logits_of_either_sign_down():
    logits = jnp.array([[2.0, -2.0, 1.0, -1.0]] * 2)
    seen = jnp.array([[True, True, False, False]] * 2)
    found = penalised(logits, seen, jnp.array([2.0, 1.0]))
    np.testing.assert_array_equal(found, [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])


def test_what_is_kept_is_unchanged():
    for result in (within(LOGITS, top_k=2), within(LOGITS, top_p=0.5), within(LOGITS, min_p=0.6)):
        np.testing.assert_array_equal(result[0, [1, 3]], LOGITS[0, [1, 3]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature):
    count = 4000
    found = np.bincount(draws(count, temperature=temperature), minlength=5) / count
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    # Five standard errors.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_tokens_of_every_block_are_drawn_by_their_probability():
    """Of a vocabulary that is no whole number of blocks, with tokens that are left out."""
    count, vocab = 40_000, 83
    rng = np.random.default_rng(0)
    scores = 2 * rng.normal(size=vocab)
    scores[rng.permutation(vocab)[:20]] = -np.inf
    expected = np.exp(scores) / np.exp(scores).sum()
    found = np.bincount(draws(count, jnp.asarray(scores, jnp.float32)[None]), minlength=vocab)
    assert found.size == vocab
    assert not found[np.isinf(scores)].any()
    apart = np.abs(found / count - expected)
    assert (apart <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_top_p_counts_the_tempered_probabilities_that_top_k_left():
    # Of the two likeliest, 0.4 and 0.25, the first alone is 0.615 of what is left.
    assert set(draws(300, temperature=1.0, top_k=2, top_p=0.6)) == {1}
    assert set(draws(300, temperature=1.0, top_k=2, top_p=0.63)) == {1, 3}
    # At temperature 1/2 it is 0.72.
    assert set(draws(300, temperature=0.5, top_k=2, top_p=0.7)) == {1}


def test_temperature_0_takes_the_likeliest_whatever_the_key():
    assert set(draws(50, temperature=0.0)) == {1}
    assert set(draws(50, temperature=0.0, top_k=3, top_p=0.9)) == {1}


def test_a_key_decides_its_row_alone():
    keys = jax.random.split(jax.random.key(0), 6)
    logits = jax.random.normal(jax.random.key(1), (6, 30))
    together = sample(keys, logits, jnp.ones(6))
    alone = [int(sample(keys[i][None], logits[i][None], jnp.ones(1))[0]) for i in range(6)]
    assert together.tolist() == alone
    assert together.dtype == jnp.int32
    assert len(set(draws(20, jnp.zeros((1, 1000)), temperature=1.0))) > 10
