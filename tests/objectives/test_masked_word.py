"""Masked words: how many, which and what becomes of them; and the loss of exactly these."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.models.transformer import SHARDING_RULES, Transformer, output_head, param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.masked_word import (
    evaluation_keys,
    mask_words,
    masked_word,
)
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS
from jaxllm.training.step import loss_and_gradients, row_keys

TOKENIZER = ByteTokenizer()
VOCAB, FIRST = TOKENIZER.vocab_size, len(SPECIAL_TOKENS)
SEQ = 16
FULL, FRACTION = CrossEntropyConfig(z_loss=0.01, label_smoothing=0.2), 0.3


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=VOCAB, layers=1, causal=False, tied=False)


@pytest.fixture(scope="module")
def batch(packed_rows):
    """Rows of one and several documents, one of which is short and one empty."""
    rows = packed_rows([[16], [3, 5], [2], []], SEQ, VOCAB - FIRST)
    rows["tokens"] += FIRST * (rows["segment_ids"] > 0)
    rows["tokens"][0, 0], rows["tokens"][1, 2] = TOKENIZER.bos_id, TOKENIZER.eos_id
    return jax.tree.map(jnp.asarray, rows)


choose = jax.jit(mask_words, static_argnums=(2, 3))


def keys(rows, seed=0):
    return row_keys(seed, 0, rows)


def text(rows, seq, seed=0):
    """A batch of rows of `seq` ordinary tokens."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, seq), FIRST, VOCAB)
    positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
    return {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}


@pytest.mark.parametrize(
    ("fraction", "counts"),
    # Of 15, 7, 2 and 0 tokens that are neither padding nor the end or beginning of a document.
    [(0.15, [2, 1, 1, 0]), (0.3, [4, 2, 1, 0]), (0.01, [1, 1, 1, 0]), (1.0, [15, 7, 2, 0])],
)
def test_the_fraction_of_what_may_be_chosen_is_chosen_whatever_the_key(
    model, batch, fraction, counts
):
    objective = masked_word(model, CrossEntropyConfig(), TOKENIZER, fraction)
    assert float(objective.weights(batch)["masked_word"]) == sum(counts)
    for seed in range(20):
        masked = choose(batch, keys(4, seed), fraction, TOKENIZER)
        np.testing.assert_array_equal(np.sum(masked.chosen, axis=1), counts)
        for row in range(4):
            tokens, used = np.asarray(batch["tokens"][row]), np.asarray(masked.chosen[row])
            places = np.asarray(masked.places[row])[used]
            assert len({*places.tolist()}) == len(places)
            assert (np.asarray(batch["segment_ids"])[row, places] > 0).all()
            assert not {*tokens[places].tolist()} & {TOKENIZER.bos_id, TOKENIZER.eos_id}
            np.testing.assert_array_equal(np.asarray(masked.labels[row])[used], tokens[places])
            others = np.setdiff1d(np.arange(SEQ), places)
            np.testing.assert_array_equal(np.asarray(masked.tokens[row])[others], tokens[others])


@pytest.mark.parametrize(("seq", "fraction"), [(1, 0.01), (7, 0.5), (70, 0.15), (10, 0.999)])
def test_there_is_room_for_all_that_are_chosen(seq, fraction):
    expected = max(1, int(np.round(np.float32(fraction) * np.float32(seq))))
    assert int(choose(text(1, seq), keys(1), fraction, TOKENIZER).chosen.sum()) == expected


def test_80_percent_are_hidden_10_exchanged_and_10_stay():
    batch = text(400, 100)
    masked = jax.device_get(choose(batch, keys(400), 0.5, TOKENIZER))
    assert masked.chosen.sum() == 20_000
    seen = np.take_along_axis(masked.tokens, masked.places, axis=1)[masked.chosen]
    labels = masked.labels[masked.chosen]
    hidden = seen == TOKENIZER.mask_id
    exchanged = ~hidden & (seen != labels)
    # Four standard deviations of 20,000 draws; one in 256 exchanges gives the token that was there.
    assert abs(hidden.mean() - 0.8) < 4 * (0.8 * 0.2 / 20_000) ** 0.5
    assert abs(exchanged.mean() - 0.1 * 255 / 256) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    # Random tokens are ordinary, and each is as likely as another: chi-squared of 255 degrees.
    counts = np.bincount(seen[exchanged], minlength=VOCAB)
    assert counts[:FIRST].sum() == 0
    expected = exchanged.sum() / 256
    assert abs(((counts[FIRST:] - expected) ** 2 / expected).sum() - 255) < 5 * (2 * 255) ** 0.5
    # Each place is chosen as often as another: 400 rows, half of each.
    often = np.bincount(masked.places[masked.chosen], minlength=100)
    assert abs(often - 200).max() < 5 * (400 * 0.25) ** 0.5


def test_random_tokens_pass_over_special_ids_wherever_they_lie():
    tokenizer = ByteTokenizer()
    tokenizer.special_ids = frozenset({0, 3, 4, 270, 272})
    tokenizer.vocab_size = 273
    masked = choose(text(200, 200), keys(200), 1.0, tokenizer)
    exchanged = (masked.tokens != text(200, 200)["tokens"]) & (masked.tokens != tokenizer.mask_id)
    found = {*np.asarray(masked.tokens)[np.asarray(exchanged)].tolist()}
    assert found == {*range(273)} - {0, 3, 4, 270, 272, tokenizer.mask_id}


def test_the_loss_is_that_of_the_originals_at_the_chosen_places(model, tiny_params, batch):
    params = tiny_params(model)
    masked = choose(batch, keys(4), FRACTION, TOKENIZER)
    output = jax.jit(Transformer(model).apply)(
        {"params": params}, masked.tokens, batch["positions"], batch["segment_ids"]
    )
    scores = np.asarray(logits(output.hidden, output_head(model, params)), np.float64)
    log_z = np.log(np.exp(scores).sum(axis=-1))
    log_p = scores - log_z[..., None]
    plain, smooth, z_loss, count = 0.0, 0.0, 0.0, 0
    for row, place in zip(*np.nonzero(_chosen(masked)), strict=True):
        own = log_p[row, place, batch["tokens"][row, place]]
        plain -= own
        smooth -= 0.8 * own + 0.2 * log_p[row, place].mean()
        z_loss += log_z[row, place] ** 2
        count += 1
    objective = masked_word(model, FULL, TOKENIZER, FRACTION)
    measure = jax.jit(lambda batch, keys: objective.sums(params, batch, {}, keys))
    sums, metrics = found = measure(batch, keys(4))
    np.testing.assert_allclose(sums["masked_word"], smooth + 0.01 * z_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (plain, count), rtol=1e-5)
    other, _ = measure(batch, keys(4, seed=1))
    assert abs(float(sums["masked_word"] - other["masked_word"])) > 1e-3
    # What is of the next token is not read.
    changed = batch | {"targets": batch["targets"] * 0, "loss_weights": batch["loss_weights"] * 7}
    jax.tree.map(np.testing.assert_array_equal, found, measure(changed, keys(4)))


def _chosen(masked):
    chosen = np.zeros(masked.tokens.shape, bool)
    for row, (places, used) in enumerate(zip(masked.places, masked.chosen, strict=True)):
        chosen[row, np.asarray(places)[np.asarray(used)]] = True
    return chosen


def test_a_hidden_token_is_told_by_all_of_its_segment_and_nothing_else(model, tiny_params):
    params = tiny_params(model)
    tokens = jnp.arange(FIRST, FIRST + SEQ)[None]  # each of them once
    segments = jnp.array([[1] * 5 + [2] * 9 + [0] * 2])
    positions = jnp.array([[*range(5), *range(9), 0, 1]])
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    objective = masked_word(model, CrossEntropyConfig(), TOKENIZER, 1e-3)

    def of_key(key):
        def loss(embedding):
            changed = params | {"embedding": embedding}
            return objective.sums(changed, batch, {}, key[None])[0]["masked_word"]

        masked = mask_words(batch, key[None], 1e-3, TOKENIZER)
        return masked, jnp.abs(jax.grad(loss)(params["embedding"])).sum(axis=-1)

    many, influence = jax.jit(jax.vmap(of_key))(keys(100))
    places = np.asarray(many.places[:, 0, 0])
    assert {*places.tolist()} == {*range(14)}
    for row, place in enumerate(places):
        seen = np.asarray(many.tokens[row, 0])[segments[0] == segments[0, place]]
        assert {*np.flatnonzero(influence[row]).tolist()} == {*seen.tolist()}


def test_evaluation_hides_the_same_of_a_row_in_whatever_batch_it_comes(model, tiny_params, batch):
    objective = masked_word(model, FULL, TOKENIZER, FRACTION)
    measure = jax.jit(lambda batch: objective.sums(tiny_params(model), batch, {}, None)[1]["loss"])
    whole = measure(batch)
    alone = [
        measure({name: array[row : row + 1] for name, array in batch.items()}) for row in range(4)
    ]
    np.testing.assert_allclose(whole, np.sum(alone, axis=0), rtol=1e-5)
    turned = {name: array[::-1] for name, array in batch.items()}
    np.testing.assert_allclose(measure(turned), whole, rtol=1e-6)
    padding = jnp.where(batch["segment_ids"] == 0, 99, batch["tokens"])
    np.testing.assert_array_equal(measure(batch | {"tokens": padding}), whole)


def test_evaluation_hides_other_places_in_other_rows():
    batch = text(50, SEQ)
    counts = _chosen(choose(batch, jax.jit(evaluation_keys)(batch), 0.3, TOKENIZER)).sum(axis=0)
    assert counts.min() > 0 and counts.max() < 50


def test_split_equals_whole(model, tiny_params, batch):
    objective = masked_word(model, FULL, TOKENIZER, FRACTION)
    whole, split = (
        jax.jit(partial(loss_and_gradients, objective, micro_batches=parts))(
            tiny_params(model), {}, batch, keys(4)
        )
        for parts in (1, 4)
    )
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_mesh_gives_what_one_device_gives(tiny_model, tiny_params):
    model = tiny_model(vocab_size=VOCAB - 1, layers=1, width=32, causal=False)  # even: to be split
    tokenizer = ByteTokenizer(SPECIAL_TOKENS[1:])
    objective, params = masked_word(model, FULL, tokenizer, FRACTION), tiny_params(model, scale=1.0)
    batch, row_keys = text(8, SEQ), keys(8)
    batch["tokens"] -= 1

    def run(params, batch, row_keys):
        drawn, evaluated = (objective.sums(params, batch, {}, k) for k in (row_keys, None))
        return objective.weights(batch), drawn, evaluated

    expected = jax.jit(run)(params, batch, row_keys)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh)
        laid = jax.device_put(params, shardings(param_shapes(model), SHARDING_RULES, mesh))
        found = jax.jit(run)(laid, jax.device_put(batch, rows), row_keys)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_hidden_states_of_other_places_are_not_compared_with_the_vocabulary(
    model, tiny_params, all_equations
):
    batch = text(4, 100)
    objective = masked_word(model, CrossEntropyConfig(), TOKENIZER, 0.15)
    program = jax.make_jaxpr(lambda batch: objective.sums(tiny_params(model), batch, {}, None))
    shapes = {
        variable.aval.shape
        for equation in all_equations(program(batch).jaxpr)
        for variable in equation.outvars
        if VOCAB in getattr(variable.aval, "shape", ())
    }
    assert (4, 16, VOCAB) in shapes
    assert (4, 100, VOCAB) not in shapes


def test_a_tokenizer_without_a_mask_is_refused(model):
    with pytest.raises(
        UserError, match=r"objective\.kind: masked_word .* config\.tokenizer\.mask_token"
    ):
        masked_word(model, CrossEntropyConfig(), ByteTokenizer(SPECIAL_TOKENS[:16]), 0.15)
