"""Advantages against NumPy in float64, on responses of uneven length."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.rollouts.advantages import (
    adapted_kl_coefficient,
    explained_variance,
    gae,
    group_advantages,
    has_spread,
    leave_one_out,
    returns_to_go,
    whitened,
)

ROWS, SEQ = 6, 14


@pytest.fixture(scope="module")
def rollout():
    """Rewards, values and steps, some with a gap between them; one row has no step."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, ROWS, SEQ)).astype(np.float32)
    steps = np.zeros((ROWS, SEQ), bool)
    for row in range(ROWS - 1):
        begin, length = rng.integers(0, 4), rng.integers(2, 9)
        steps[row, begin : begin + length] = True
    steps[1, :] = False
    steps[1, [2, 3, 6, 7, 9]] = True  # between them stands what others have written
    return tuple(map(jnp.asarray, (rewards, values, steps)))


def gae_in_numpy(rewards, values, steps, gamma, lam):
    found = np.zeros((ROWS, SEQ))
    for row in range(ROWS):
        (places,) = np.nonzero(steps[row])
        r, v = (np.float64(x[row, places]) for x in (rewards, values))
        following = np.append(v[1:], 0)[: len(v)]
        deltas = r + gamma * following - v
        for t in range(len(places)):
            later = range(t, len(places))
            found[row, places[t]] = sum((gamma * lam) ** (u - t) * deltas[u] for u in later)
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_are_sums_of_temporal_differences(rollout, gamma, lam):
    rewards, values, steps = rollout
    found = gae(rewards, values, steps, gamma, lam)
    np.testing.assert_allclose(
        found, gae_in_numpy(rewards, values, steps, gamma, lam), rtol=1e-5, atol=1e-6
    )


def test_what_stands_elsewhere_is_of_no_matter(rollout):
    rewards, values, steps = rollout
    other = [jnp.where(steps, x, x + 7) for x in (rewards, values)]
    np.testing.assert_array_equal(
        gae(*other, steps, 1.0, 0.9), gae(rewards, values, steps, 1.0, 0.9)
    )


def test_returns_are_the_rewards_that_are_to_come(rollout):
    rewards, _, steps = rollout
    found, steps = np.asarray(returns_to_go(rewards, steps, 1.0)), np.asarray(steps)
    for row in range(ROWS):
        (places,) = np.nonzero(steps[row])
        wanted = np.cumsum(np.float64(rewards[row, places])[::-1])[::-1]
        np.testing.assert_allclose(found[row, places], wanted, rtol=1e-5, atol=1e-6)
    assert not found[~steps].any()


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_is_of_the_places_meant_alone(rollout, keep_mean):
    rewards, _, steps = rollout
    rewards = 3 * rewards + 5
    found, steps = np.asarray(whitened(rewards, steps, keep_mean)), np.asarray(steps)
    meant = np.asarray(rewards, np.float64)[steps]
    wanted = (meant - meant.mean()) / np.sqrt(meant.var() + 1e-8) + keep_mean * meant.mean()
    np.testing.assert_allclose(found[steps], wanted, rtol=1e-4, atol=1e-5)
    assert not found[~steps].any()
    # The mean is removed: many implementations have kept it.
    assert abs(found[steps].mean() - keep_mean * meant.mean()) < 1e-5


def test_groups():
    scores = np.array([[1, 0, 0, 1], [2, 2, 2, 2], [0, -1, 5, 3]], np.float32)
    flat = jnp.asarray(scores.ravel())
    apart = scores - scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(group_advantages(flat, 4, False), apart.ravel(), atol=1e-6)
    divided = apart / (scores.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(flat, 4, True), divided.ravel(), rtol=1e-5)
    others = (scores.sum(axis=1, keepdims=True) - scores) / 3
    np.testing.assert_allclose(leave_one_out(flat, 4), (scores - others).ravel(), rtol=1e-5)
    np.testing.assert_array_equal(has_spread(flat, 4), [True] * 4 + [False] * 4 + [True] * 4)


def test_explained_variance(rollout):
    rewards, values, steps = rollout
    meant, foretold = (np.asarray(x, np.float64)[steps] for x in (rewards, values))
    wanted = 1 - (meant - foretold).var() / meant.var()
    np.testing.assert_allclose(explained_variance(values, rewards, steps), wanted, rtol=1e-4)
    assert float(explained_variance(rewards, rewards, steps)) == 1
    constant = jnp.full_like(rewards, 3.0)
    np.testing.assert_allclose(explained_variance(constant, rewards, steps), 0, atol=1e-5)
    # Where there is nothing to foretell.
    assert float(explained_variance(values, constant, steps)) == 0


@pytest.mark.parametrize(
    ("kl", "wanted"), [(6.0, 0.1), (6.6, 0.1 * 1.001), (60.0, 0.1 * 1.002), (0.0, 0.1 * 0.998)]
)
def test_the_coefficient_follows_the_divergence_within_bounds(kl, wanted):
    found = adapted_kl_coefficient(jnp.float32(0.1), jnp.float32(kl), 100, 6.0, 10_000.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
