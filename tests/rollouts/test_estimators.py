"""What is learnt of each action against NumPy in float64, from ragged responses."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.rollouts.estimators import GaeConfig, GaeEstimator, GroupConfig, GroupEstimator

GROUP, GROUPS, SEQ = 4, 3, 12
ROWS = GROUP * GROUPS


class Rollout:
    """Rows with a response each, and the same as lists."""

    def __init__(self):
        rng = np.random.default_rng(1)
        names = ("old_log_probs", "reference_log_probs", "old_values")
        self.given = {name: rng.normal(size=(ROWS, SEQ)) for name in names}
        self.places = []
        actions, states = np.zeros((ROWS, SEQ)), np.zeros((ROWS, SEQ))
        for row in range(ROWS):
            begin, length = rng.integers(0, 4), rng.integers(1, 7)
            places = np.arange(begin, begin + length)
            if row == 2:  # what stands between was written by a tool
                places = np.array([1, 2, 5, 6])
            actions[row, places] = 1
            states[row, places] = 1
            self.places.append(places)
        self.ended = rng.random(ROWS) < 0.7
        self.states = [
            np.append(places, places[-1] + 1) if ended else places
            for places, ended in zip(self.places, self.ended, strict=True)
        ]
        for row, places in enumerate(self.states):
            states[row, places] = 1
        assert 0 < sum(self.ended) < ROWS
        self.scores = rng.integers(0, 3, ROWS).astype(float)
        self.scores[GROUP : 2 * GROUP] = 1  # a group without spread
        batch = self.given | {"loss_weights": actions, "value_weights": states}
        self.batch = {name: jnp.asarray(x, jnp.float32) for name, x in batch.items()}

    def ratios(self, row):
        """log π - log π_ref of each action."""
        at = row, self.places[row]
        return self.given["old_log_probs"][at] - self.given["reference_log_probs"][at]

    def __call__(self, estimator, kl_coef):
        scores = jnp.asarray(self.scores, jnp.float32)
        return estimator(self.batch, scores, jnp.asarray(self.ended), jnp.float32(kl_coef))


@pytest.fixture(scope="module")
def rollout():
    return Rollout()


@pytest.mark.parametrize("how", ["group", "divided", "leave_one_out"])
def test_a_response_is_compared_with_those_to_the_same_prompt(how, rollout):
    config = GroupConfig("leave_one_out" if how == "leave_one_out" else "group", how == "divided")
    found, told = rollout(GroupEstimator(config, GROUP, True, ()), 0.3)
    totals = [s - 0.3 * rollout.ratios(row).sum() for row, s in enumerate(rollout.scores)]
    groups = np.reshape(totals, (GROUPS, GROUP))
    apart = groups - groups.mean(axis=1, keepdims=True)
    if how == "divided":
        apart /= groups.std(axis=1, ddof=1, keepdims=True) + 1e-6
    if how == "leave_one_out":
        apart = groups - (groups.sum(axis=1, keepdims=True) - groups) / (GROUP - 1)
    wanted = np.zeros((ROWS, SEQ))
    for row, places in enumerate(rollout.places):
        wanted[row, places] = apart.ravel()[row]
    np.testing.assert_allclose(found["advantages"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["loss_weights"], rollout.batch["loss_weights"])
    divergence = np.mean([rollout.ratios(row).sum() for row in range(ROWS)])
    np.testing.assert_allclose(told["kl"], divergence, rtol=1e-4)
    np.testing.assert_allclose(told["groups_with_spread"], 2 / 3, rtol=1e-5)


def test_over_the_whole_rollout(rollout):
    found, _ = rollout(GroupEstimator(GroupConfig("global"), GROUP, True, ()), 0.3)
    groups = rollout.scores.reshape(GROUPS, GROUP)
    apart = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    to_come = []
    for row in range(ROWS):
        rewards = -0.3 * rollout.ratios(row)
        rewards[-1] += apart[row]
        to_come.append(np.cumsum(rewards[::-1])[::-1])
    every = np.concatenate(to_come)
    for row, places in enumerate(rollout.places):
        wanted = (to_come[row] - every.mean()) / every.std()
        np.testing.assert_allclose(found["advantages"][row, places], wanted, rtol=1e-3, atol=1e-4)


def test_what_there_is_nothing_to_learn_from_is_left_out(rollout):
    config = GroupConfig(filter_groups=True)
    found, _ = rollout(GroupEstimator(config, GROUP, False, ()), 0.0)
    learnt = np.asarray(found["loss_weights"]).any(axis=1)
    np.testing.assert_array_equal(learnt, [True] * 4 + [False] * 4 + [True] * 4)
    config = GroupConfig(filter_overlong=True)
    found, _ = rollout(GroupEstimator(config, GROUP, False, ()), 0.0)
    learnt = np.asarray(found["loss_weights"]).any(axis=1)
    np.testing.assert_array_equal(learnt, rollout.ended)


def test_what_is_left_out_is_not_whitened_with_the_rest(rollout):
    config = GroupConfig("global", filter_overlong=True)
    found, _ = rollout(GroupEstimator(config, GROUP, False, ()), 0.0)
    learnt = np.asarray(found["loss_weights"]) > 0
    advantages = np.asarray(found["advantages"])
    np.testing.assert_allclose(advantages[learnt].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(advantages[learnt].std(), 1, rtol=1e-4)
    assert not advantages[~learnt].any()


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("whiten_advantages", [False, True])
def test_by_rewards_and_values(whiten_rewards, whiten_advantages, rollout):
    config = GaeConfig(0.9, 0.8, whiten_advantages, whiten_rewards)
    found, told = rollout(GaeEstimator(config, True, ()), 0.3)
    rewards = []
    for row in range(ROWS):
        missing = len(rollout.states[row]) - len(rollout.places[row])
        rewards.append(np.append(-0.3 * rollout.ratios(row), [0.0] * missing))
        rewards[row][-1] += rollout.scores[row]  # behind the end, or at the last token of none
    if whiten_rewards:
        every = np.concatenate(rewards)
        rewards = [(each - every.mean()) / every.std() + every.mean() for each in rewards]
    advantages, returns = [], []
    for row, places in enumerate(rollout.places):
        values = rollout.given["old_values"][row, rollout.states[row]]
        deltas, later, estimated = rewards[row] + 0.9 * np.append(values[1:], 0) - values, 0.0, []
        for delta in deltas[::-1]:
            later = delta + 0.9 * 0.8 * later
            estimated.insert(0, later)
        advantages.append(np.array(estimated[: len(places)]))
        returns.append(np.array(estimated) + values)
    if whiten_advantages:
        every = np.concatenate(advantages)
        advantages = [(each - every.mean()) / every.std() for each in advantages]
    for row, places in enumerate(rollout.places):
        np.testing.assert_allclose(
            found["advantages"][row, places], advantages[row], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            found["returns"][row, rollout.states[row]], returns[row], rtol=1e-3, atol=1e-4
        )
    np.testing.assert_allclose(told["return"], np.concatenate(returns).mean(), rtol=1e-3)
    np.testing.assert_allclose(told["kl_coef"], 0.3, rtol=1e-6)
