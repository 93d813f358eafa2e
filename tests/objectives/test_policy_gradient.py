"""The losses of policies and values against NumPy in float64, on ragged responses."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import HeadConfig
from jaxllm.models.transformer import Output
from jaxllm.objectives import grpo as grpo_module
from jaxllm.objectives import ppo as ppo_module
from jaxllm.objectives.grpo import grpo
from jaxllm.objectives.policy_gradient import PolicyLossConfig
from jaxllm.objectives.ppo import PpoLossConfig, ppo
from jaxllm.ops.vocabulary import TokenLogProbs

MOST = 9


@pytest.fixture(scope="module")
def rollout(ragged):
    """The ragged batch with advantages and old log-probabilities, some far from the new ones."""
    rng = np.random.default_rng(5)
    actions = np.asarray(ragged.batch["loss_weights"])
    log_probs = -rng.uniform(0.2, 3, ragged.shape)
    old = log_probs + rng.choice([0.02, 0.5], ragged.shape) * rng.normal(size=ragged.shape)
    # What stands where there is no action is of no matter.
    given = {
        "old_log_probs": np.where(actions > 0, old, -1e6),
        "reference_log_probs": np.where(actions > 0, log_probs + rng.normal(size=old.shape), 1e6),
        "advantages": np.where(actions > 0, rng.normal(size=old.shape), np.inf),
        "sampler_log_probs": np.where(actions > 0, old + rng.normal(size=old.shape), np.nan),
    }
    responses = [response for ranking in ragged.rankings for response in ranking]
    batch = ragged.batch | {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    return batch, responses, log_probs


@pytest.fixture
def given_scores(monkeypatch):
    """In place of a model: log-probabilities that `params` hold; their entropy is their square."""

    def scores(model, params, batch, temperature):
        assert temperature == 0.7
        found = params["log_probs"][batch["tokens"]]
        output = Output(jnp.zeros((*found.shape, 1)), None, None)
        return TokenLogProbs(found, found, jnp.square(found), found), output

    monkeypatch.setattr(grpo_module, "learnt_log_probs", scores)
    monkeypatch.setattr(ppo_module, "learnt_log_probs", scores)


def in_numpy(config, batch, responses):
    """The loss as a function of log-probabilities, and what is measured of each action."""
    old, reference, advantages = (
        np.asarray(batch[name], np.float64)
        for name in ("old_log_probs", "reference_log_probs", "advantages")
    )

    def of_actions(log_probs, response):
        at = response.row, response.places
        log_ratio = log_probs[at] - old[at]
        if config.ratio == "response":
            log_ratio = np.full(len(log_ratio), log_ratio.mean())
        ratio, a = np.exp(log_ratio), advantages[at]
        clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        apart = reference[at] - log_probs[at]
        loss = np.maximum(-a * ratio, -a * clipped)
        k3 = np.exp(apart) - 1 - apart
        return loss, k3, log_probs[at] ** 2, ratio, (-a * clipped > -a * ratio), log_ratio

    def loss(log_probs):
        losses = []
        for response in responses:
            policy, k3, entropy, *_ = of_actions(log_probs, response)
            losses.append(policy + config.kl_loss * k3 - config.entropy_bonus * entropy)
        if config.normalisation == "token":
            return np.concatenate(losses).mean()
        if config.normalisation == "response":
            return np.mean([each.mean() for each in losses])
        return np.mean([each.sum() / MOST for each in losses])

    def measured(log_probs):
        found = [of_actions(log_probs, response) for response in responses]
        gaps = np.abs(old - np.asarray(batch["sampler_log_probs"], np.float64))
        gap = np.concatenate([gaps[each.row, each.places] for each in responses])
        loss, k3, entropy, ratio, clipped, log_ratio = map(np.concatenate, zip(*found, strict=True))
        return {
            "loss": loss.mean(),
            "entropy": entropy.mean(),
            "ratio": ratio.mean(),
            "ratio_variance": ((ratio - 1) ** 2).mean(),
            "clip_fraction": clipped.mean(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "rollout/logprob_gap": gap.mean(),
        } | ({"kl": k3.mean()} if config.kl_loss else {})

    return loss, measured


CONFIGS = [
    PolicyLossConfig(),
    PolicyLossConfig(clip_low=0.1, clip_high=0.28, kl_loss=0.3),
    PolicyLossConfig(normalisation="response", entropy_bonus=0.2),
    PolicyLossConfig(normalisation="constant", kl_loss=0.1),
    PolicyLossConfig(ratio="response", normalisation="response", clip_low=0.03, clip_high=0.04),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=["plain", "asymmetric", "response", "constant", "sequence"]
)
def test_the_loss_of_a_policy(config, rollout, given_scores, agree, tiny_model):
    batch, responses, log_probs = rollout
    expected, measured = in_numpy(config, batch, responses)
    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    metrics = agree(grpo(tiny_model(), config, 0.7, MOST), params, {}, batch, expected)
    wanted = measured(log_probs)
    assert 0.1 < wanted["clip_fraction"] < 0.9
    assert metrics.keys() >= wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_first_update_is_that_of_the_policy_gradient(rollout, given_scores, agree, tiny_model):
    """Without old log-probabilities the ratio is 1, and the gradient -A of each log-probability."""
    batch, responses, log_probs = rollout
    batch = {name: array for name, array in batch.items() if name != "old_log_probs"}
    advantages = np.asarray(batch["advantages"], np.float64)
    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    places = [(r.row, place) for r in responses for place in r.places]

    def expected(moved):
        return np.mean([-advantages[at] * np.exp(moved[at] - log_probs[at]) for at in places])

    metrics = agree(grpo(tiny_model(), PolicyLossConfig(), 0.7, MOST), params, {}, batch, expected)
    assert metrics["ratio"] == 1
    assert metrics["ratio_variance"] == metrics["approx_kl"] == metrics["clip_fraction"] == 0


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_loss_of_values(clip, rollout, given_scores, agree, tiny_model, monkeypatch):
    batch, responses, log_probs = rollout
    config = PpoLossConfig(value_clip=clip, value_coefficient=0.3)
    rng = np.random.default_rng(6)
    values, returns = rng.normal(size=(2, *log_probs.shape))
    old = values + 0.3 * rng.normal(size=values.shape)
    states = np.zeros(log_probs.shape)
    for response in responses:
        states[response.row, [*response.places, response.places[-1] + 1]] = 1
    monkeypatch.setattr(
        ppo_module, "state_values", lambda model, params, batch: params[batch["tokens"]]
    )
    batch = batch | {
        "value_weights": jnp.asarray(states, jnp.float32),
        "returns": jnp.asarray(returns, jnp.float32),
        "old_values": jnp.asarray(old, jnp.float32),
    }
    of_policy, _ = in_numpy(config, batch, responses)
    fixed = of_policy(log_probs)

    def losses(values):
        near = old + np.clip(values - old, -clip, clip) if clip else values
        squared, of_near = (values - returns) ** 2, (near - returns) ** 2
        return np.maximum(squared, of_near)[states > 0], (of_near > squared)[states > 0]

    def expected(values):
        return fixed + 0.3 * 0.5 * losses(values)[0].mean()

    objective = ppo(
        tiny_model(), tiny_model(head=HeadConfig(1)), config, temperature=0.7, most=MOST
    )
    frozen = {"policy": {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}}
    params = {"value": jnp.asarray(values.ravel(), jnp.float32)}
    metrics = agree(objective, params, frozen, batch, expected)
    loss, clipped = losses(values)
    np.testing.assert_allclose(metrics["value_loss"], 0.5 * loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["value"], values[states > 0].mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["value_clip_fraction"], clipped.mean(), rtol=1e-5)
    assert (metrics["value_clip_fraction"] > 0.05) == bool(clip)


def test_no_value_within_the_clip_counts_as_clipped():
    """Whatever rounding makes of old + (new - old)."""
    rng = np.random.default_rng(7)
    values = rng.uniform(-0.1, 0.1, (8, 64)).astype(np.float32)
    batch = {
        "value_weights": jnp.ones((8, 64)),
        "returns": jnp.asarray(rng.normal(size=(8, 64)), jnp.float32),
        "old_values": jnp.asarray(rng.uniform(-0.09, 0.09, (8, 64)), jnp.float32),
    }
    config = PpoLossConfig(value_clip=0.2)
    _, metrics = ppo_module._value_sums(config, jnp.asarray(values), batch)
    assert metrics["value_clip_fraction"][0] == 0
