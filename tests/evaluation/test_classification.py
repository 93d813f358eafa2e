"""Scores of classifications against known answers, however texts are laid into batches."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxllm.data.labels import Labels
from jaxllm.evaluation.classification import (
    ClassificationEvaluator,
    class_scores,
    classification_scores,
    told,
)
from jaxllm.models.config import HeadConfig
from jaxllm.objectives.classification import text_outputs

THREE = Labels("single_label", ("a", "b", "c"), (1, 1, 1), 3)


def test_scores_of_a_confusion_matrix():
    """The values are those of sklearn.metrics: accuracy_score and f1_score(average="macro")."""
    counts = {"confusion": np.array([[5.0, 1, 0], [2, 3, 0], [0, 1, 0]]), "loss": np.array(18.0)}
    scores = classification_scores(counts, THREE)
    assert scores["eval/loss"] == pytest.approx(18 / 12)
    f1 = [10 / 13, 6 / 10, 0]
    assert scores["eval/accuracy"] == pytest.approx(8 / 12)
    assert scores["eval/macro_f1"] == pytest.approx(np.mean(f1))
    assert scores["eval/majority"] == pytest.approx(6 / 12)
    first, second, third = class_scores(counts, THREE)
    assert (first.texts, first.chosen) == (6, 7)
    assert (first.precision, first.recall) == (pytest.approx(5 / 7), pytest.approx(5 / 6))
    assert second.f1 == pytest.approx(0.6)
    assert (third.precision, third.recall, third.f1) == (0, 0, 0)
    assert told(counts, THREE)["confusion"] == [[5, 1, 0], [2, 3, 0], [0, 1, 0]]


def test_a_class_that_no_text_is_of_and_none_is_taken_for_does_not_count():
    counts = {"confusion": np.array([[3.0, 0, 0], [0, 2, 0], [0, 0, 0]]), "loss": np.array(1.0)}
    assert classification_scores(counts, THREE)["eval/macro_f1"] == 1


def test_scores_of_sets():
    labels = Labels("multi_label", ("a", "b"), (1, 1), 2)
    counts = {
        "right": np.array([3.0, 1]),
        "wrong": np.array([1.0, 0]),
        "missed": np.array([0.0, 2]),
        "exact": np.array(2.0),
        "texts": np.array(5.0),
        "loss": np.array(2.0),
    }
    scores = classification_scores(counts, labels)
    assert scores["eval/loss"] == pytest.approx(0.4)
    assert scores["eval/accuracy"] == pytest.approx(0.4)
    assert scores["eval/macro_f1"] == pytest.approx((6 / 7 + 2 / 4) / 2)
    assert scores["eval/micro_f1"] == pytest.approx(8 / 11)


def test_scores_of_values_are_in_units_of_the_label():
    labels = Labels("regression", (), (), 4, mean=10.0, deviation=2.0)
    y, p = np.array([-1.0, 0, 1, 2]), np.array([-0.5, 0, 1.5, 1])
    terms = [np.ones(4), y, p, y * y, p * p, y * p, abs(y - p), (y - p) ** 2]
    counts = {"moments": np.array([t.sum() for t in terms]), "loss": terms[-1].sum()}
    scores = classification_scores(counts, labels)
    assert scores["eval/loss"] == pytest.approx(((y - p) ** 2).mean())
    assert scores["eval/mean_absolute_error"] == pytest.approx(2 * abs(y - p).mean())
    assert scores["eval/root_mean_squared_error"] == pytest.approx(2 * ((y - p) ** 2).mean() ** 0.5)
    assert scores["eval/pearson"] == pytest.approx(np.corrcoef(y, p)[0, 1])
    constant = [np.ones(4), y, 0 * y, y * y, 0 * y, 0 * y, abs(y), y * y]
    counts = {"moments": np.array([t.sum() for t in constant]), "loss": constant[-1].sum()}
    scores = classification_scores(counts, labels)
    assert np.isnan(scores["eval/pearson"])


@pytest.fixture
def batches():
    """Five texts, two of them in one row, and a row of padding."""
    draw = np.random.default_rng(0)
    ends = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6], np.float32)
    positions = np.array([[0, 1, 0, 1, 2, 0], range(6), [0] * 6])
    segments = np.array([[1, 1, 2, 2, 2, 0], [1] * 6, [0] * 6])
    return [
        {
            "tokens": jnp.asarray(draw.integers(3, 50, (3, 6))),
            "targets": jnp.asarray(draw.integers(0, 3, (3, 6))),
            "positions": jnp.asarray(positions),
            "segment_ids": jnp.asarray(segments),
            "loss_weights": jnp.asarray(ends),
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_what_is_counted_is_what_the_model_gives(kind, batches, tiny_model, tiny_params):
    model = tiny_model(layers=1, head=HeadConfig(1 if kind == "regression" else 3))
    params = tiny_params(model)
    targets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)[:, : model.head.outputs]
    found, labels = [], []
    for batch in batches:
        outputs = np.asarray(text_outputs(model, params, batch)[0])
        ends = np.asarray(batch["loss_weights"]) > 0
        found += list(outputs[ends])
        labels += list(targets[np.asarray(batch["targets"])[ends]])
    found, labels = np.array(found), np.array(labels)
    counts = ClassificationEvaluator(model, kind, targets)(params, {}, batches)
    assert len(found) == 6
    if kind == "single_label":
        losses = special.logsumexp(found, axis=1) - (labels * found).sum(1)
        expected = np.zeros((3, 3))
        np.add.at(expected, (labels.argmax(1), found.argmax(1)), 1)
        np.testing.assert_array_equal(counts["confusion"], expected)
    elif kind == "multi_label":
        losses = (np.logaddexp(0, found) - labels * found).mean(1)
        chosen = found > 0
        np.testing.assert_array_equal(counts["right"], (chosen & (labels > 0)).sum(0))
        np.testing.assert_array_equal(counts["wrong"], (chosen & (labels == 0)).sum(0))
        np.testing.assert_array_equal(counts["missed"], (~chosen & (labels > 0)).sum(0))
        assert counts["exact"] == (chosen == (labels > 0)).all(1).sum()
        assert counts["texts"] == 6
    else:
        losses = (found - labels)[:, 0] ** 2
        p, y = found[:, 0], labels[:, 0]
        terms = [np.ones(6), y, p, y * y, p * p, y * p, abs(y - p), (y - p) ** 2]
        np.testing.assert_allclose(counts["moments"], [t.sum() for t in terms], rtol=1e-4)
    assert counts["loss"] == pytest.approx(losses.sum(), rel=1e-5)
