"""Policies of one action, whose best is known: from rollouts to advantages to updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.models.config import HeadConfig
from jaxllm.models.transformer import Output
from jaxllm.objectives import grpo as grpo_module
from jaxllm.objectives import ppo as ppo_module
from jaxllm.objectives.grpo import grpo
from jaxllm.objectives.policy_gradient import PolicyLossConfig
from jaxllm.objectives.ppo import PpoLossConfig, ppo
from jaxllm.ops.vocabulary import TokenLogProbs
from jaxllm.rollouts.estimators import GaeConfig, GaeEstimator, GroupConfig, GroupEstimator
from jaxllm.training.step import loss_and_gradients

ARMS, DRAWN, BETA = 6, 3000, 0.5


@pytest.fixture
def bandit():
    """What each arm is worth, and the reference policy."""
    rng = np.random.default_rng(0)
    return rng.normal(size=ARMS).astype(np.float32), rng.dirichlet(np.ones(ARMS)).astype(np.float32)


@pytest.fixture(autouse=True)
def a_policy_is_a_table(monkeypatch):
    def scores(model, params, batch, temperature):
        table = jax.nn.log_softmax(params["logits"])
        found = table[batch["targets"]]
        output = Output(jnp.zeros((*found.shape, 1)), None, None)
        return TokenLogProbs(found, found, found, found), output

    monkeypatch.setattr(grpo_module, "learnt_log_probs", scores)
    monkeypatch.setattr(ppo_module, "learnt_log_probs", scores)
    monkeypatch.setattr(
        ppo_module,
        "state_values",
        lambda model, params, batch: jnp.where(
            batch["positions"] > 0, params["after"][batch["tokens"]], params["before"]
        ),
    )


def rollout(log_policy, log_reference):
    """Responses of one token: each arm as often as the policy takes it, rounded."""
    drawn = (jnp.arange(DRAWN) + 0.5) / DRAWN
    arms = jnp.searchsorted(jnp.cumsum(jnp.exp(log_policy)), drawn).clip(0, ARMS - 1)
    zeros = jnp.zeros((DRAWN, 2), jnp.int32)
    actions = zeros.at[:, 0].set(1).astype(jnp.float32)
    rows = {
        "tokens": zeros.at[:, 1].set(arms),
        "targets": zeros.at[:, 0].set(arms),
        "positions": zeros.at[:, 1].set(1),
        "segment_ids": zeros + 1,
        "loss_weights": actions,
        "value_weights": jnp.ones_like(actions),
        "old_log_probs": actions * log_policy[arms][:, None],
        "sampler_log_probs": actions * log_policy[arms][:, None],
        "reference_log_probs": actions * log_reference[arms][:, None],
    }
    return rows, arms


def trained(objective, estimator, params, bandit, policy_of, kl_coef, epochs, rounds=600):
    """The policy after so many rollouts, each gone through so many times."""
    worth, reference = (jnp.asarray(x) for x in bandit)
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, rounds * epochs))

    def round_of(carry, _):
        params, state = carry
        log_policy = jax.nn.log_softmax(policy_of(params))
        rows, arms = rollout(log_policy, jnp.log(reference))
        if "value" in params:
            rows["old_values"] = ppo_module.state_values(None, params["value"], rows)
        ended = jnp.ones(DRAWN, bool)
        batch, _ = estimator(rows, worth[arms], ended, jnp.float32(kl_coef))

        def update(carry, _):
            params, state = carry
            _, gradient, metrics = loss_and_gradients(objective, params, {}, batch, None, 1)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), metrics["ratio_variance"]

        carry, apart = jax.lax.scan(update, (params, state), length=epochs)
        return carry, apart[0]

    run = jax.jit(lambda carry: jax.lax.scan(round_of, carry, length=rounds))
    (params, _), apart = run((params, optimizer.init(params)))
    assert float(jnp.max(apart)) < 1e-10  # the first ratio of each rollout is 1
    return np.asarray(jax.nn.softmax(policy_of(params)))


def distance(one, other):
    """Total variation."""
    return 0.5 * np.abs(one - other).sum()


def best_of(bandit):
    """π ∝ π_ref exp(r/β), which the reward less β KL(π ‖ π_ref) is greatest of."""
    worth, reference = bandit
    wanted = reference * np.exp(worth / BETA)
    return wanted / wanted.sum()


@pytest.mark.parametrize("advantages", ["group", "leave_one_out"])
def test_groups_with_the_divergence_in_the_reward(advantages, bandit, tiny_model):
    config = GroupConfig(advantages=advantages, divide_by_std=False)
    estimator = GroupEstimator(config, DRAWN, True, ("old_log_probs",))
    objective = grpo(tiny_model(), PolicyLossConfig(), 1.0, 1)
    params = {"logits": jnp.log(jnp.asarray(bandit[1]))}
    found = trained(objective, estimator, params, bandit, lambda p: p["logits"], BETA, epochs=2)
    assert distance(found, best_of(bandit)) < 0.005


def test_ppo(bandit, tiny_model):
    estimator = GaeEstimator(GaeConfig(whiten_advantages=False), True, ("old_log_probs",))
    config = PpoLossConfig(value_clip=0.0, value_coefficient=1.0)
    objective = ppo(tiny_model(), tiny_model(head=HeadConfig(1)), config, 1.0, 1)
    params = {
        "policy": {"logits": jnp.log(jnp.asarray(bandit[1]))},
        "value": {"before": jnp.zeros(()), "after": jnp.zeros(ARMS)},
    }
    found = trained(
        objective, estimator, params, bandit, lambda p: p["policy"]["logits"], BETA, epochs=4
    )
    assert distance(found, best_of(bandit)) < 0.005


def test_the_divergence_in_the_loss_has_a_fixed_point_of_its_own(bandit, tiny_model):
    """Differentiated where the actions are drawn from π, k3 pulls by 1 - π_ref/π, and not by
    log π/π_ref: in balance with the advantage A, π = π_ref / (1 - A/β)."""
    estimator = GroupEstimator(GroupConfig(divide_by_std=False), DRAWN, True, ("old_log_probs",))
    beta = 1.0
    objective = grpo(tiny_model(), PolicyLossConfig(kl_loss=beta), 1.0, 1)
    worth, reference = bandit
    params = {"logits": jnp.log(jnp.asarray(reference))}
    found = trained(objective, estimator, params, bandit, lambda p: p["logits"], 0.0, epochs=1)
    advantage = worth - found @ worth
    assert distance(found, reference / (1 - advantage / beta)) < 0.005
    other = reference * np.exp(worth / beta)
    assert distance(found, other / other.sum()) > 0.02
