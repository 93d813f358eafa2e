"""Losses of preferences against NumPy in float64, on rankings of uneven size and length."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxllm.data.packing import packed_rows
from jaxllm.data.rankings import Rankings
from jaxllm.data.store import write_stores
from jaxllm.models.config import HeadConfig
from jaxllm.models.transformer import Output
from jaxllm.objectives import dpo as dpo_module
from jaxllm.objectives import kto as kto_module
from jaxllm.objectives import reward as reward_module
from jaxllm.objectives.dpo import DpoLossConfig, dpo
from jaxllm.objectives.kto import ReferencePoint, kto, mismatched
from jaxllm.objectives.responses import Pairs, response_log_probs, response_sums
from jaxllm.objectives.reward import RewardLossConfig, reward
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import chat_template
from jaxllm.training.step import loss_and_gradients

ROWS, SEQ, LARGEST = 4, 40, 4


class Response:
    """Where a response lies: its row, the places of its tokens, and how good it is."""

    def __init__(self, row, places, last, score):
        self.row, self.places, self.last, self.score = row, places, last, score


@pytest.fixture(scope="module")
def ragged():
    """A batch of rankings of two to four responses, some of them equally good, and each response's
    place."""
    rng = np.random.default_rng(7)
    batch = {
        name: np.zeros((ROWS, SEQ), np.int32)
        for name in ("targets", "positions", "segment_ids", "ranking_ids")
    }
    batch["tokens"] = np.arange(ROWS * SEQ, dtype=np.int32).reshape(ROWS, SEQ)  # each its own
    batch |= {
        name: np.zeros((ROWS, SEQ), np.float32)
        for name in ("loss_weights", "scores", "reference_log_probs")
    }
    rankings = []
    for row in range(ROWS):
        place = segment = 0
        for number in range(1, 4):
            scores = rng.integers(0, 3, 2 + len(rankings) % (LARGEST - 1)).astype(float)
            prompt, lengths = rng.integers(1, 4), rng.integers(1, 5, len(scores))
            if place + (prompt + lengths).sum() > SEQ or (row == ROWS - 1 and number > 1):
                break
            ranking = []
            for score, length in zip(scores, lengths, strict=True):
                span, segment = slice(place, place + prompt + length), segment + 1
                batch["positions"][row, span] = np.arange(prompt + length)
                batch["segment_ids"][row, span] = segment
                batch["ranking_ids"][row, span] = number
                batch["scores"][row, span] = score
                # The first token of a response is predicted at the prompt's last place.
                places = np.arange(place + prompt - 1, place + prompt + length - 1)
                batch["loss_weights"][row, places] = 1
                batch["reference_log_probs"][row, span.stop - 1] = -rng.uniform(1, 9)
                ranking.append(Response(row, places, span.stop - 1, score))
                place = span.stop
            rankings.append(ranking)
    assert {len(ranking) for ranking in rankings} == {2, 3, 4}
    assert any(len({r.score for r in ranking}) == 1 for ranking in rankings)  # nothing preferred
    return {name: jnp.asarray(array) for name, array in batch.items()}, rankings


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


def finite_differences(function, values, step=1e-6):
    gradient = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        moved = values.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


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
def test_losses_of_pairs(config, ragged, monkeypatch, tiny_model):
    batch, rankings = ragged
    log_probs = -np.random.default_rng(1).uniform(0.2, 4, (ROWS, SEQ))

    def given(model, params, batch):
        found = response_sums(batch["loss_weights"] * params["log_probs"][batch["tokens"]], batch)
        return found, Output(jnp.zeros((*batch["tokens"].shape, 1)), None, None)

    monkeypatch.setattr(dpo_module, "response_log_probs", given)
    objective = dpo(tiny_model(), config, LARGEST)
    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    references = np.asarray(batch["reference_log_probs"], np.float64)
    expected = dpo_in_numpy(config, rankings, references)
    for micro_batches in (1, 2):
        loss, gradient, metrics = jax.jit(
            lambda params, batch, m=micro_batches: loss_and_gradients(
                objective, params, {}, batch, None, m
            )
        )(params, batch)
        np.testing.assert_allclose(loss, expected(log_probs), rtol=1e-5)
        np.testing.assert_allclose(
            gradient["log_probs"].reshape(ROWS, SEQ),
            finite_differences(expected, log_probs),
            rtol=2e-4,
            atol=1e-6,
        )
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


def test_the_loss_of_single_responses(ragged, monkeypatch, tiny_model):
    batch, rankings = ragged
    responses = [response for ranking in rankings for response in ranking]
    good = np.array([response.score > 0 for response in responses])
    assert 2 < good.sum() < len(good) - 2
    rng = np.random.default_rng(4)
    log_probs, others = -rng.uniform(0.2, 4, (2, ROWS, SEQ))

    def given(model, params, batch):
        found = response_sums(batch["loss_weights"] * params["log_probs"][batch["tokens"]], batch)
        return found, Output(jnp.zeros((*batch["tokens"].shape, 1)), None, None)

    monkeypatch.setattr(kto_module, "response_log_probs", given)
    config = DpoLossConfig(loss="kto", beta=0.3, desirable=1.5, undesirable=0.7)
    reference = lambda params: params["reference"]  # noqa: E731
    point_of = ReferencePoint(tiny_model(), reference, SingleDeviceSharding(jax.devices()[0]))
    objective = kto(tiny_model(), config, reference, point_of)
    point = 0.8
    batch = batch | {"reference_point": jnp.full((ROWS, SEQ), point)}

    def ratios(log_probs):
        return np.array([(log_probs - others)[r.row, r.places].sum() for r in responses])

    def expected(log_probs):
        moved = 0.3 * (ratios(log_probs) - point) * np.where(good, 1, -1)
        return np.mean(np.where(good, 1.5, 0.7) * (1 - 1 / (1 + np.exp(-moved))))

    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    frozen = {"reference": {"log_probs": jnp.asarray(others.ravel(), jnp.float32)}}
    for micro_batches in (1, 2):
        loss, gradient, metrics = jax.jit(
            lambda params, batch, m=micro_batches: loss_and_gradients(
                objective, params, frozen, batch, None, m
            )
        )(params, batch)
        np.testing.assert_allclose(loss, expected(log_probs), rtol=1e-5)
        np.testing.assert_allclose(
            gradient["log_probs"].reshape(ROWS, SEQ),
            finite_differences(expected, log_probs),
            rtol=2e-4,
            atol=1e-6,
        )
    found = 0.3 * ratios(log_probs)
    np.testing.assert_allclose(metrics["better"], found[good].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["worse"], found[~good].mean(), rtol=1e-4)
    right = np.where(good, found > 0.3 * point, found < 0.3 * point)
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-5)


def test_responses_meet_the_other_prompts_of_their_row():
    rows = {
        # Prompts 1 2 | 5 | 8 8, responses 3 4 | 6 7 | 9; one prompt alone; one twice, and another.
        "tokens": [
            [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 0, 0],
            [1, 2, 3, *[0] * 9],
            [1, 2, 3, 1, 2, 4, 5, 2, 6, 0, 0, 0],
        ],
        "segment_ids": [
            [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
            [1, 1, 1, *[0] * 9],
            [1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0],
        ],
        "positions": [
            [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0],
            [0, 1, 2, *[0] * 9],
            [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0],
        ],
        "loss_weights": [
            [0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0],
            [0, 1, 0, *[0] * 9],
            [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
        ],
    }
    dtypes = {"loss_weights": jnp.float32}
    found = mismatched({n: jnp.asarray(a, dtypes.get(n, jnp.int32)) for n, a in rows.items()})
    np.testing.assert_array_equal(found["tokens"][0], [1, 2, 6, 7, 5, 9, 8, 8, 3, 4, 0, 0])
    np.testing.assert_array_equal(found["segment_ids"][0], [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(found["positions"][0, :10], [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])
    np.testing.assert_array_equal(found["loss_weights"][0], [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0])
    learnt = np.asarray(found["loss_weights"][0]) > 0
    np.testing.assert_array_equal(np.asarray(found["targets"][0])[learnt], [6, 7, 9, 3, 4])
    assert not np.asarray(found["loss_weights"][1]).any()
    # What stands behind its own prompt is not learnt.
    np.testing.assert_array_equal(found["tokens"][2], [1, 2, 4, 1, 2, 6, 5, 2, 3, 0, 0, 0])
    np.testing.assert_array_equal(found["loss_weights"][2], [0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0])


def test_the_reference_point_is_of_mismatched_responses(laid_out, tiny_model, tiny_params):
    vocab_size, _, _, packed = laid_out
    model = tiny_model(vocab_size, layers=1)
    params = jax.tree.map(lambda x: x + 0.05, tiny_params(model))
    both = (params, jax.tree.map(lambda x: 0.9 * x, params))
    rows = [alone for row in range(len(packed["tokens"])) for alone in mismatches(packed, row)]
    assert len(rows) == 4
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    policy, of_reference = (response_log_probs(model, p, batch)[0][:, 0] for p in both)
    wanted = float((policy - of_reference).mean())
    assert abs(wanted) > 1e-3
    sharding = SingleDeviceSharding(jax.devices()[0])
    # Once the policy and once the reference is taken for the other: one of both is above 0.
    for sign, (one, other) in ((1, both), (-1, both[::-1])):
        frozen = {"reference": other}
        found = []
        for parts in (1, 2):
            point = ReferencePoint(model, lambda p: p["reference"], sharding, parts)
            completed = point.of_batch(one, frozen, packed)
            assert completed.keys() == packed.keys() | {"reference_point"}
            found.append(completed)
        # In evaluation of all batches together.
        halves = [{name: array[half::2] for name, array in packed.items()} for half in (0, 1)]
        found += point.of_all(one, frozen, halves)
        points = np.concatenate([np.unique(np.asarray(each["reference_point"])) for each in found])
        np.testing.assert_allclose(points, max(sign * wanted, 0), rtol=1e-4)


def mismatches(packed, row):
    """Each response of a row in a row of its own, behind the prompt before its own, unless that is
    the same one."""
    tokens, segments, weights = (
        np.asarray(packed[name][row]) for name in ("tokens", "segment_ids", "loss_weights")
    )
    prompts, responses = [], []
    for segment in range(1, segments.max() + 1):
        (places,) = np.nonzero(segments == segment)
        size = int(np.nonzero(weights[places])[0][0]) + 1
        prompts.append(tokens[places[:size]])
        responses.append(tokens[places[size:]])
    for index, response in enumerate(responses):
        prompt = prompts[index - 1]
        if prompt.tolist() == prompts[index].tolist():
            continue
        ids = np.concatenate([prompt, response])
        alone = {name: np.zeros(64, np.int32) for name in ("tokens", "targets", "positions")}
        alone["segment_ids"] = np.zeros(64, np.int32)
        alone["loss_weights"] = np.zeros(64, np.float32)
        alone["tokens"][: len(ids)] = ids
        alone["targets"][: len(ids) - 1] = ids[1:]
        alone["positions"][: len(ids)] = np.arange(len(ids))
        alone["segment_ids"][: len(ids)] = 1
        alone["loss_weights"][len(prompt) - 1 : len(ids) - 1] = 1
        yield alone


@pytest.mark.parametrize(
    "config", [RewardLossConfig(), RewardLossConfig(margin=0.3, centring=0.05)], ids=["", "margin"]
)
def test_losses_of_rewards(config, ragged, monkeypatch, tiny_model):
    batch, rankings = ragged
    rewards = np.random.default_rng(2).normal(size=(ROWS, SEQ)) * 3
    monkeypatch.setattr(
        reward_module,
        "text_outputs",
        lambda model, params, batch, keys: (
            params["rewards"][batch["tokens"]][..., None],
            Output(jnp.zeros((*batch["tokens"].shape, 1)), None, None),
        ),
    )
    objective = reward(tiny_model(), config, LARGEST)

    def expected(rewards):
        def of_pair(a, b):
            one, other = rewards[a.row, a.last], rewards[b.row, b.last]
            wanted = config.margin * (a.score - b.score)
            return -log_sigmoid(one - other - wanted) + config.centring * (one + other) ** 2

        return over_rankings(rankings, of_pair)

    params = {"rewards": jnp.asarray(rewards.ravel(), jnp.float32)}
    for micro_batches in (1, 4):
        loss, gradient, metrics = jax.jit(
            lambda params, batch, m=micro_batches: loss_and_gradients(
                objective, params, {}, batch, None, m
            )
        )(params, batch)
        np.testing.assert_allclose(loss, expected(rewards), rtol=1e-5)
        np.testing.assert_allclose(
            gradient["rewards"].reshape(ROWS, SEQ),
            finite_differences(expected, rewards),
            rtol=2e-4,
            atol=1e-6,
        )
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
    batch, _ = ragged
    rng = np.random.default_rng(3)
    batch = batch | {
        name: jnp.asarray(rng.integers(0, 20, (ROWS, SEQ)), jnp.int32)
        for name in ("tokens", "targets")
    }
    if how == "reward":
        model = tiny_model(20, layers=1, head=HeadConfig(1))
        objective = reward(model, RewardLossConfig(), LARGEST)
    else:
        model = tiny_model(20, layers=1)
        objective = dpo(model, DpoLossConfig(), LARGEST)
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


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The same rankings in rows of their own, and packed."""
    tokenizer = ByteTokenizer()
    encoder = Rankings(chat_template(tokenizer, "bos_separated"), 32)
    rankings = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "responses": responses,
            "scores": scores,
        }
        for prompt, responses, scores in (
            ("ab", ["c", "defg", "hi"], [2, 1, 0]),
            ("j", ["kl", "mnop"], [1, 0]),
            ("q", ["r", "s"], [0, 1]),
            ("tu", ["vw", "x"], [0.5, 0]),
            ("y", ["z", "abc", "d"], [1, 0, 1]),
        )
    ]
    named = [("all", json.dumps(ranking)) for ranking in rankings]
    folder = tmp_path_factory.mktemp("stores") / "store"
    store = write_stores(folder, ["all"], named, tokenizer, "", encoder=encoder)["all"]
    references = [-np.arange(1, 13, dtype=np.float32)]

    def batch(packing):
        rows = packed_rows(store, packing, 32, part_values={"reference_log_probs": references})
        found = [rows[number] for number in range(len(rows))]
        found += [rows.empty()] * (-len(found) % 4)
        return {n: jnp.asarray(np.stack([row[n] for row in found])) for n in found[0]}

    return tokenizer.vocab_size, store.most_parts, batch("none"), batch("best_fit")


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
