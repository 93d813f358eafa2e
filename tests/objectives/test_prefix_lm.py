"""Prefix LM: exactly the prefix is seen both ways, and exactly what follows it is predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.prefix_lm import prefix_lengths, prefix_lm
from jaxllm.training.step import loss_and_gradients

SEQ = 12
FULL = CrossEntropyConfig(z_loss=0.01, label_smoothing=0.2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=1)


@pytest.fixture(scope="module")
def batch(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[7, 4], [12], [1, 2, 3], []], SEQ))


def run(model, fraction, params, batch, micro_batches=1):
    objective = prefix_lm(model, FULL, fraction)
    compiled = jax.jit(
        lambda params, batch: loss_and_gradients(objective, params, {}, batch, None, micro_batches)
    )
    return compiled(params, batch)


def test_the_length_of_its_prefix_is_known_at_each_token(batch):
    found = prefix_lengths(batch, 0.5)
    for row, lengths in enumerate([[3] * 7 + [2] * 4, [6] * 12, [0] + [1] * 2 + [1] * 3]):
        np.testing.assert_array_equal(found[row, : len(lengths)], lengths)
    np.testing.assert_array_equal(prefix_lengths(batch, 0.9)[0, :11], [6] * 7 + [3] * 4)


@pytest.mark.parametrize(
    ("fraction", "predicted"),
    [
        # Prefixes of 3 and 2 of 7 and 4, of 6 of 12, of 0, 1 and 1 of 1, 2 and 3.
        (0.5, [[2, 3, 4, 5, 8, 9], [5, 6, 7, 8, 9, 10], [1, 3, 4]]),
        # Prefixes of 6 and 3, 10, 0, 1 and 2: the last target alone, but for the second row.
        (0.9, [[5, 9], [9, 10], [1, 4]]),
        (0.0, [[0, 1, 2, 3, 4, 5, 7, 8, 9], [*range(11)], [1, 3, 4]]),
    ],
)
def test_what_follows_the_prefix_is_predicted(model, batch, fraction, predicted):
    weights_of = jax.jit(prefix_lm(model, CrossEntropyConfig(), fraction).weights)
    for row, places in enumerate(predicted):
        for place in range(SEQ):
            # One place alone has weight.
            alone = jnp.zeros((4, SEQ)).at[row, place].set(0.25)
            weights = alone * batch["loss_weights"]
            found = weights_of(batch | {"loss_weights": weights})["prefix_lm"]
            assert float(found) == (0.25 if place in places else 0.0)
    total = sum(map(len, predicted))
    assert float(weights_of(batch)["prefix_lm"]) == total


def test_the_prefix_is_seen_by_all_of_the_document_and_the_rest_by_what_follows(
    tiny_model, tiny_params
):
    model = tiny_model(layers=2, tied=False)  # two, for what comes by way of others
    params = tiny_params(model)
    tokens = jnp.arange(SEQ)[None]  # each of them once
    segment_ids = jnp.array([[1] * 6 + [2] * 5 + [0]])
    positions = jnp.array([[*range(6), *range(5), 0]])
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
    batch |= {"targets": jnp.roll(tokens, -1, axis=1), "loss_weights": jnp.ones((1, SEQ))}
    prefix = prefix_lengths(batch, 0.5)

    def hidden(embedding):
        changed = {"params": params | {"embedding": embedding}}
        output = Transformer(model).apply(changed, tokens, positions, segment_ids, prefix=prefix)
        return jnp.sum(output.hidden[0] * jnp.arange(1.0, 17), axis=-1)

    jacobian = jax.jit(jax.jacrev(hidden))(params["embedding"])
    seen = np.abs(jacobian).sum(axis=-1)[:, :SEQ] > 0
    expected = np.zeros((SEQ, SEQ), bool)
    expected[:6, :3] = expected[6:11, 6:8] = expected[11, 11] = True  # prefixes of 3 and of 2
    for begin, end in ((0, 6), (6, 11)):
        expected[begin:end, begin:end] |= np.tri(end - begin, dtype=bool)
    np.testing.assert_array_equal(seen, expected)
    # Whoever predicts does not see what, and whoever sees it does not predict.
    weights_of = jax.jit(prefix_lm(model, CrossEntropyConfig(), 0.5).weights)
    for place in range(SEQ - 2):
        alone = batch | {"loss_weights": jnp.zeros((1, SEQ)).at[0, place].set(1.0)}
        predicts = bool(weights_of(alone)["prefix_lm"])
        assert predicts != seen[place, place + 1] or place == 5  # whose target is of another


def test_the_model_is_given_the_prefix(tiny_model, tiny_params, batch):
    model = tiny_model(layers=2)  # in one layer nobody would hear of what the prefix has seen
    params = tiny_params(model)
    one = {name: array[1:2] for name, array in batch.items()}  # a document of 12
    weights = jnp.where(one["positions"] >= 5, one["loss_weights"], 0.0)

    def losses(weights):
        causal = next_token(model, CrossEntropyConfig())
        return (
            prefix_lm(model, CrossEntropyConfig(), 0.5).sums(params, one, {}, None)[1]["loss"],
            causal.sums(params, one | {"loss_weights": weights}, {}, None)[1]["loss"],
        )

    (found, weight), (blind, same_weight) = jax.jit(losses)(weights)
    assert weight == same_weight == 6
    assert abs(float(found - blind)) > 1e-3


def test_without_a_prefix_it_is_next_token_prediction(model, tiny_params, batch):
    params = tiny_params(model)
    found = run(model, 0.0, params, batch)
    expected = jax.jit(
        lambda params, batch: loss_and_gradients(
            next_token(model, FULL), params, {}, batch, None, 1
        )
    )(params, batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_split_equals_whole(model, tiny_params, batch):
    params = tiny_params(model)
    whole, split = (run(model, 0.5, params, batch, parts) for parts in (1, 4))
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
