"""The loss of labels: known answers, and the same however texts are packed and batches cut."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.labels import LabelledTexts, label_table, labels_of
from jaxllm.data.packing import packed_rows as rows_of
from jaxllm.data.store import write_stores
from jaxllm.errors import UserError
from jaxllm.models.config import HeadConfig
from jaxllm.models.transformer import init_params
from jaxllm.objectives.classification import ClassificationConfig, classification, text_outputs
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.training.step import loss_and_gradients

SEQ = 16
LABELS = {
    "single_label": ["a", "b", "a", "c", "b", "a", "a"],
    "multi_label": [("a",), (), ("a", "c"), ("b", "c"), ("b",), ("a",), ("a", "b", "c")],
    "regression": [1.0, 2.5, 0.0, -3.0, 4.0, 1.0, 2.0],
}
TEXTS = ["ab", "cdef", "g", "hijklmnopq", "rstuvwxyzabcdefg", "h", "ij"]


@pytest.fixture(params=[(kind, pooling) for kind in LABELS for pooling in ("last", "mean")])
def case(request, tiny_model, tmp_path):
    """A model, an objective and a function that lays all texts into a batch."""
    kind, pooling = request.param
    tokenizer = ByteTokenizer()
    labels = labels_of(LABELS[kind], kind)
    encoder = LabelledTexts(labels, label_table(labels, LABELS[kind]), tokenizer, SEQ + 1)
    model = tiny_model(tokenizer.vocab_size, layers=2, head=HeadConfig(labels.outputs, pooling))
    weights = np.linspace(1, 2, len(labels.names)).astype(np.float32)
    objective = classification(model, kind, encoder.targets, weights)

    def batch(packing):
        records = zip(TEXTS, LABELS[kind], strict=True)
        named = (("all", json.dumps({"text": t, "label": label})) for t, label in records)
        folder = tmp_path / packing
        store = write_stores(folder, ["all"], named, tokenizer, "", encoder=encoder)["all"]
        rows = rows_of(store, packing, SEQ)
        rows = [rows[number] for number in range(len(rows))]
        rows += [{name: np.zeros_like(a) for name, a in rows[0].items()}] * (-len(rows) % 4)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return model, objective, batch


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # By the largest number: on another processor what is near 0 beside 11 differed by 1.3e-5.
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5 * max(1, np.abs(other).max()))


def test_packing_and_batch_split_change_nothing(case, tiny_params):
    model, objective, batch = case
    params = tiny_params(model)
    run = jax.jit(
        lambda params, batch, parts: loss_and_gradients(objective, params, {}, batch, None, parts),
        static_argnums=2,
    )
    alone, packed = batch("none"), batch("best_fit")
    assert packed["segment_ids"].max() > 1
    whole = run(params, alone, 1)
    assert float(whole[0]) > 0
    assert_same(run(params, packed, 1), whole)
    assert_same(run(params, alone, 4), whole)
    gradients = whole[1]
    assert np.abs(gradients["head"]["kernel"]).sum() > 0
    assert np.abs(gradients["embedding"]).sum() > 0


@pytest.fixture
def model(tiny_model):
    return tiny_model(head=HeadConfig(3))


@pytest.fixture
def rows():
    """Two texts in a row of five places, with labels 0 and 2."""
    return {
        "tokens": jnp.array([[4, 5, 6, 7, 0]]),
        "targets": jnp.array([[1, 0, 1, 2, 0]]),
        "positions": jnp.array([[0, 1, 0, 1, 0]]),
        "segment_ids": jnp.array([[1, 1, 2, 2, 0]]),
        "loss_weights": jnp.array([[0.0, 1, 0, 1, 0]]),
    }


def test_the_loss_of_a_class_is_its_weighed_cross_entropy(model, tiny_params, rows):
    params = tiny_params(model)
    outputs = np.asarray(text_outputs(model, params, rows)[0][0], np.float64)
    logs = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    first, second = -logs[1, 0], -logs[3, 2]
    weights = np.array([1, 1, 3], np.float32)
    objective = classification(model, "single_label", np.eye(3, dtype=np.float32), weights)
    loss, _, metrics = loss_and_gradients(objective, params, {}, rows, None, 1)
    np.testing.assert_allclose(loss, (first + 3 * second) / 4, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], (first + second) / 2, rtol=1e-4)


def test_the_loss_of_sets_and_of_values(tiny_model, model, tiny_params, rows):
    params = tiny_params(model)
    outputs = np.asarray(text_outputs(model, params, rows)[0][0], np.float64)
    table = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    weights = np.array([1, 2, 3], np.float32)
    objective = classification(model, "multi_label", table, weights)
    loss, _, metrics = loss_and_gradients(objective, params, {}, rows, None, 1)
    signs = 2 * table[[0, 2]] - 1
    binary = np.log1p(np.exp(-signs * outputs[[1, 3]]))
    np.testing.assert_allclose(loss, (binary * weights).sum() / 12, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], binary.mean(), rtol=1e-4)

    model = tiny_model(head=HeadConfig(1))
    params = tiny_params(model)
    outputs = np.asarray(text_outputs(model, params, rows)[0][0, :, 0], np.float64)
    values = np.array([[0.5], [9], [-1]], np.float32)
    objective = classification(model, "regression", values, np.zeros(0, np.float32))
    loss, _, _ = loss_and_gradients(objective, params, {}, rows, None, 1)
    expected = ((outputs[1] - 0.5) ** 2 + (outputs[3] + 1) ** 2) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_class_weights_are_named_or_balanced():
    config = ClassificationConfig("b:2.5, 7:4")
    np.testing.assert_array_equal(config.weights(("a", "b", 7), (1, 2, 3), 6), [1, 2.5, 4])
    balanced = ClassificationConfig("balanced").weights(("a", "b"), (1, 3), 4)
    np.testing.assert_allclose(balanced, [2, 2 / 3])
    np.testing.assert_array_equal(ClassificationConfig().weights(("a", "b"), (1, 3), 4), [1, 1])
    with pytest.raises(
        UserError,
        match=r"classify\.class_weights: 'c' is no class of the",
    ):
        ClassificationConfig("c:2").weights(("a", "b"), (1, 3), 4)


@pytest.mark.parametrize("text", ["a", "a:", ":2", "a:x", "a:0", "a:-1", "a:nan"])
def test_class_weights_must_be_positive_numbers(text):
    with pytest.raises(ValueError, match="is not CLASS:WEIGHT with a positive number"):
        ClassificationConfig(text)


def test_an_untouched_head_knows_nothing(tiny_model, rows):
    """ln 3 of three classes."""
    model = tiny_model(head=HeadConfig(3))
    params = init_params(model, jax.random.key(0))
    objective = classification(
        model, "single_label", np.eye(3, dtype=np.float32), np.ones(3, np.float32)
    )
    loss, _, _ = loss_and_gradients(objective, params, {}, rows, None, 1)
    np.testing.assert_allclose(loss, math.log(3), rtol=1e-6)
