"""The loss of answers: however examples are packed, split, padded and named, it is the same."""

import json

import jax
import numpy as np
import pytest

from jaxllm.data.examples import ExamplesConfig
from jaxllm.data.packing import packed_rows as rows_of
from jaxllm.data.store import write_stores
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.training.step import loss_and_gradients

SEQ = 24


def conversation(*contents):
    roles = ("user", "assistant") * len(contents)
    turns = zip(roles, contents, strict=False)
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


TEXTS = [
    conversation("ab", "cdef"),
    conversation("g", "h", "ij", "k"),
    conversation("lmnopq", "r"),
    conversation("s", "t"),
    conversation("uvw", "xyzabcdefghijklmnopqrstuvwxyz"),  # cut
    conversation("never an answer in such a row", "a"),  # left out
]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer):
    return tiny_model(tokenizer.vocab_size, layers=2)


@pytest.fixture(scope="module")
def evaluate(model):
    """Jitted `(params, batch, micro_batches) -> (loss, gradients, metrics)`."""

    def run(params, batch, micro_batches=1):
        objective = next_token(model, CrossEntropyConfig())
        return loss_and_gradients(objective, params, {}, batch, None, micro_batches)

    return jax.jit(run, static_argnums=2)


@pytest.fixture
def batch_of(tokenizer, tmp_path):
    """All examples as one batch of a multiple of 4 rows."""

    def make(packing, tokenizer=tokenizer, texts=TEXTS):
        encoder = ExamplesConfig().encoder(tokenizer, SEQ)
        named = (("all", text) for text in texts)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        store = write_stores(folder, ["all"], named, tokenizer, "", encoder=encoder)["all"]
        rows = rows_of(store, packing, SEQ)
        rows = [rows[number] for number in range(len(rows))]
        empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
        rows += [empty] * (-len(rows) % 4)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return make


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_packed_and_unpacked_are_the_same(model, tiny_params, evaluate, batch_of):
    params = tiny_params(model)
    alone, packed = batch_of("none"), batch_of("best_fit")
    assert packed["segment_ids"].max() > 1
    assert (packed["segment_ids"] > 0).any(1).sum() < (alone["segment_ids"] > 0).any(1).sum()
    assert packed["loss_weights"].sum() == alone["loss_weights"].sum() > 0
    assert_same(evaluate(params, packed), evaluate(params, alone))


def test_the_loss_is_the_mean_over_learnt_tokens_however_the_batch_is_cut(
    model, tiny_params, evaluate, batch_of
):
    """Rows have from 2 to 19 learnt tokens: a mean of means would be another number."""
    params, batch = tiny_params(model), batch_of("none")
    whole = evaluate(params, batch)
    for parts in (2, 4):
        assert_same(evaluate(params, batch, parts), whole)
    each = []
    for row in range(len(batch["tokens"])):
        alone = {name: array[row : row + 1] for name, array in batch.items()}
        each.append((float(evaluate(params, alone)[0]), float(alone["loss_weights"].sum())))
    losses, weights = np.array(each).T
    np.testing.assert_allclose(whole[0], (losses * weights).sum() / weights.sum(), rtol=1e-5)
    counted = losses[weights > 0]
    assert abs(counted.mean() - float(whole[0])) > 1e-3


def test_padding_on_the_left_is_padding_on_the_right(model, tiny_params, evaluate, batch_of):
    params, batch = tiny_params(model), batch_of("none")
    shifted = {name: np.zeros_like(array) for name, array in batch.items()}
    for row, segments in enumerate(batch["segment_ids"]):
        size = int((segments > 0).sum())
        for name, array in batch.items():
            shifted[name][row, SEQ - size :] = array[row, :size]
    assert (shifted["segment_ids"][:, 0] == 0).any()
    assert_same(evaluate(params, shifted), evaluate(params, batch))


def test_a_tokenizer_that_pads_with_its_eos_gives_the_same(
    tokenizer, model, tiny_params, evaluate, batch_of, tmp_path
):
    tokenizer.save(tmp_path / "saved")
    config = TokenizerConfig(path=str(tmp_path / "saved"), pad_token="</s>")
    same = load_tokenizer(tmp_path / "saved", config)
    assert same.pad_id == same.eos_id == tokenizer.eos_id != tokenizer.pad_id
    batch, other = batch_of("best_fit"), batch_of("best_fit", same)
    jax.tree.map(np.testing.assert_array_equal, batch, other)
    # And the token that ends an answer is learnt.
    ends = (batch["targets"] == same.eos_id) & (batch["segment_ids"] > 0)
    assert ends.sum() == 5
    assert batch["loss_weights"][ends].all()


def test_too_long_conversations_are_cut_or_left_out_and_never_give_nan(
    model, tiny_params, evaluate, batch_of
):
    params = tiny_params(model)
    batch = batch_of("none", texts=TEXTS[4:])
    real = (batch["segment_ids"] > 0).any(1)
    assert real.tolist() == [True, False, False, False]
    assert batch["loss_weights"][0].sum() > 0
    for leaf in jax.tree.leaves(evaluate(params, batch)):
        assert np.isfinite(leaf).all()
