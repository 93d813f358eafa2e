"""Losses of preferences against NumPy in float64, on rankings of uneven size and length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import HeadConfig
from jaxllm.models.transformer import Output
from jaxllm.objectives import dpo as dpo_module
from jaxllm.objectives import reward as reward_module
from jaxllm.objectives.dpo import DpoLossConfig, dpo
from jaxllm.objectives.responses import Pairs
from jaxllm.objectives.reward import RewardLossConfig, reward
from jaxllm.training.step import loss_and_gradients


def numpy_pairs(ranking):
    """The pairs of a ranking, better first."""
    return [(a, b) for a in ranking for b in ranking if a.score > b.score]


def over_rankings(rankings, loss_of_pair):
    """The mean over rankings of the mean over pairs."""
    losses = [
        np.mean([loss_of_pair(a, b) for a, b in numpy_pairs(ranking)])
        for ranking in rankings
        if numpy_pairs(ranking)
    ]
    return np.mean(losses)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x)) if x > 0 else x - np.log1p(np.exp(x))


def dpo_in_numpy(config, rankings, references):
    """The whole loss as a function of the tokens' log-probabilities."""

    def loss(log_probs):
        def total(response):
            return log_probs[response.row, response.places].sum()

        def mean(response):
            return log_probs[response.row, response.places].mean()

        def log_odds(response):
            return mean(response) - np.log(1 - np.exp(mean(response)))

        def of_pair(a, b):
            delta = total(a) - references[a.row, a.last]
            delta -= total(b) - references[b.row, b.last]
            beta = config.beta
            if config.loss == "sigmoid":
                share = config.label_smoothing
                return -(1 - share) * log_sigmoid(beta * delta) - share * log_sigmoid(-beta * delta)
            if config.loss == "ipo":
                return (delta - 1 / (2 * beta)) ** 2
            if config.loss == "hinge":
                return max(0.0, 1 - beta * delta)
            if config.loss == "simpo":
                return -log_sigmoid(beta * (mean(a) - mean(b)) - config.gamma)
            return -beta * log_sigmoid(log_odds(a) - log_odds(b))

        found = over_rankings(rankings, of_pair)
        likelihood = 1.0 if config.loss == "orpo" else config.best_response
        best = [r for g in rankings for r in g if r.score == max(o.score for o in g)]
        tokens = sum(len(r.places) for r in best)
        return found - likelihood * sum(map(total, best)) / tokens

    return loss


@pytest.mark.parametrize(
    "config",
    [
        DpoLossConfig(),
        DpoLossConfig(label_smoothing=0.2, beta=0.3, best_response=0.4),
        DpoLossConfig(loss="ipo", beta=0.5),
        DpoLossConfig(loss="hinge", beta=0.7),
        DpoLossConfig(loss="simpo", beta=2.0, gamma=0.3),
        DpoLossConfig(loss="orpo", beta=0.2),
    ],
    ids=lambda config: config.loss + ("_smoothed" if config.label_smoothing else ""),
)
def test_losses_of_pairs(config, ragged, given_log_probs, agree, monkeypatch, tiny_model):
    batch, rankings, largest = ragged
    log_probs = -np.random.default_rng(1).uniform(0.2, 4, ragged.shape)

    monkeypatch.setattr(dpo_module, "response_log_probs", given_log_probs)
    objective = dpo(tiny_model(), config, largest)
    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    references = np.asarray(batch["reference_log_probs"], np.float64)
    expected = dpo_in_numpy(config, rankings, references)
    metrics = agree(objective, params, {}, batch, expected)
    assert metrics.keys() >= metrics_in_numpy(config, rankings, references, log_probs).keys()
    for name, value in metrics_in_numpy(config, rankings, references, log_probs).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def metrics_in_numpy(config, rankings, references, log_probs):
    def total(response):
        return log_probs[response.row, response.places].sum()

    def reward_of(response):
        if config.has_reference:
            return config.beta * (total(response) - references[response.row, response.last])
        return config.beta * total(response) / len(response.places)

    all_of_them = [response for ranking in rankings for response in ranking]
    tokens = sum(len(response.places) for response in all_of_them)
    found = {
        "accuracy": over_rankings(rankings, lambda a, b: reward_of(a) > reward_of(b)),
        "better": over_rankings(rankings, lambda a, b: reward_of(a)),
        "worse": over_rankings(rankings, lambda a, b: reward_of(b)),
        "margin": over_rankings(rankings, lambda a, b: reward_of(a) - reward_of(b)),
        "log_prob": sum(map(total, all_of_them)) / tokens,
    }
    if config.has_reference:
        found["log_ratio"] = sum(map(reward_of, all_of_them)) / config.beta / tokens
    return found


@pytest.mark.parametrize(
    "config", [RewardLossConfig(), RewardLossConfig(margin=0.3, centring=0.05)], ids=["", "margin"]
)
def test_losses_of_rewards(config, ragged, agree, monkeypatch, tiny_model):
    batch, rankings, largest = ragged
    rewards = np.random.default_rng(2).normal(size=ragged.shape) * 3
    monkeypatch.setattr(
        reward_module,
        "text_outputs",
        lambda model, params, batch, keys: (
            params["rewards"][batch["tokens"]][..., None],
            Output(jnp.zeros((*batch["tokens"].shape, 1)), None, None),
        ),
    )
    objective = reward(tiny_model(), config, largest)

    def expected(rewards):
        def of_pair(a, b):
            one, other = rewards[a.row, a.last], rewards[b.row, b.last]
            wanted = config.margin * (a.score - b.score)
            return -log_sigmoid(one - other - wanted) + config.centring * (one + other) ** 2

        return over_rankings(rankings, of_pair)

    params = {"rewards": jnp.asarray(rewards.ravel(), jnp.float32)}
    metrics = agree(objective, params, {}, batch, expected)
    right = over_rankings(rankings, lambda a, b: rewards[a.row, a.last] > rewards[b.row, b.last])
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-5)


def test_dpo_finds_the_policy_that_its_labels_ask_for():
    """Of a bandit whose labels are drawn as Bradley and Terry say, in expectation, π ∝ π_ref
    exp(r/β) (Rafailov et al. 2023, equation 4)."""
    rng = np.random.default_rng(0)
    arms, beta = 6, 0.5
    reward_of, reference = rng.normal(size=arms), rng.dirichlet(np.ones(arms))
    config = DpoLossConfig(beta=beta)
    first, second = np.array([(i, j) for i in range(arms) for j in range(arms) if i != j]).T
    preferred = 1 / (1 + np.exp(reward_of[second] - reward_of[first]))  # first before second

    def loss(logits):
        ratio = jax.nn.log_softmax(logits) - jnp.log(reference)
        values = jnp.stack([ratio[first], ratio[second]], axis=1)
        pairs = Pairs(
            jnp.asarray(preferred)[:, None, None] * jnp.array([1.0, 0.0]),
            jnp.ones((len(first), 1, 1)) * jnp.array([1.0, 0.0]),
        )
        found = dpo_module._Likelihoods(values, jnp.zeros_like(values), jnp.ones_like(values))
        return pairs.total(dpo_module._losses(config, pairs, found)) / len(first)

    gradient = jax.jit(jax.grad(loss))
    logits = jnp.log(jnp.asarray(reference))
    for _ in range(3000):
        logits -= 8.0 * gradient(logits)
    wanted = reference * np.exp(reward_of / beta)
    wanted /= wanted.sum()
    distance = 0.5 * np.abs(np.asarray(jax.nn.softmax(logits)) - wanted).sum()
    assert distance < 1e-3


@pytest.mark.parametrize("how", ["reward", "dpo"])
def test_what_stands_at_padding_is_of_no_matter(how, ragged, tiny_model, tiny_params):
    """The end of a response is known by its segment: not by the row's length, nor by a token."""
    batch, _, largest = ragged
    rng = np.random.default_rng(3)
    batch = batch | {
        name: jnp.asarray(rng.integers(0, 20, ragged.shape), jnp.int32)
        for name in ("tokens", "targets")
    }
    if how == "reward":
        model = tiny_model(20, layers=1, head=HeadConfig(1))
        objective = reward(model, RewardLossConfig(), largest)
    else:
        model = tiny_model(20, layers=1)
        objective = dpo(model, DpoLossConfig(), largest)
    params = jax.tree.map(lambda x: x + 0.1, tiny_params(model))
    run = jax.jit(lambda batch: loss_and_gradients(objective, params, {}, batch, None, 1))
    padding = np.asarray(batch["segment_ids"]) == 0
    assert padding.any()
    other = batch | {
        name: jnp.where(padding, (batch[name] + 7) % 20, batch[name])
        for name in ("tokens", "targets")
    }
    for one, two in zip(jax.tree.leaves(run(batch)), jax.tree.leaves(run(other)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("how", ["reward", "sigmoid", "simpo", "orpo"])
def test_packing_and_batch_split_change_nothing(how, laid_out, tiny_model, tiny_params):
    vocab_size, largest, alone, packed = laid_out
    assert packed["ranking_ids"].max() > 1
    if how == "reward":
        model = tiny_model(vocab_size, layers=1, head=HeadConfig(1))
        objective = reward(model, RewardLossConfig(margin=0.2, centring=0.1), largest)
    else:
        model = tiny_model(vocab_size, layers=1)
        objective = dpo(model, DpoLossConfig(loss=how, beta=2.0), largest)
    params = jax.tree.map(lambda x: x + 0.05, tiny_params(model))
    run = jax.jit(
        lambda batch, parts: loss_and_gradients(objective, params, {}, batch, None, parts),
        static_argnums=1,
    )
    whole = run(alone, 1)
    assert float(whole[0]) != 0
    for other in (run(packed, 1), run(alone, 4)):
        for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-5 * max(1, np.abs(two).max()))
