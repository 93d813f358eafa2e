"""A classifier gives what evaluation found, for texts in any company."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.labels import LabelledTexts, Labels, label_table
from jaxllm.inference.classifier import Classifier
from jaxllm.models.config import HeadConfig
from jaxllm.objectives.classification import text_outputs
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

TEXTS = ["ab", "c" * 40, "de", "f" * 300]
CONTEXT = 64


@pytest.fixture
def classifier(tiny_model, tiny_params):
    def make(labels, batch_size=3):
        tokenizer = ByteTokenizer()
        model = tiny_model(tokenizer.vocab_size, layers=1, head=HeadConfig(labels.outputs))
        return Classifier(model, tiny_params(model), tokenizer, labels, CONTEXT, batch_size)

    return make


def expected(classifier, text):
    """The outputs for a text laid out as in training, alone."""
    labels, tokenizer = classifier.labels, classifier.tokenizer
    label = labels.names[0] if labels.names else 1.0
    encoder = LabelledTexts(labels, label_table(labels, [label]), tokenizer, CONTEXT + 1)
    [encoded] = encoder([json.dumps({"text": text, "label": label})])
    tokens = np.array([encoded.ids[:-1]])
    batch = {
        "tokens": tokens,
        "positions": np.arange(tokens.size)[None],
        "segment_ids": np.ones_like(tokens),
    }
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    return np.asarray(text_outputs(classifier.model, classifier.params, batch)[0])[0, -1]


def test_classes_come_with_their_probabilities(classifier):
    classify = classifier(Labels("single_label", ("x", 7, "z"), (1, 1, 1), 3))
    found = classify(TEXTS)
    assert len(found) == 4
    for text, prediction in zip(TEXTS, found, strict=True):
        outputs = expected(classify, text)
        shares = np.exp(outputs) / np.exp(outputs).sum()
        np.testing.assert_allclose(list(prediction.probabilities.values()), shares, rtol=1e-3)
        assert prediction.label == classify.labels.names[int(outputs.argmax())]
        assert list(prediction.probabilities) == ["x", "7", "z"]


def test_sets_are_the_classes_that_are_likelier_than_not(classifier):
    classify = classifier(Labels("multi_label", ("x", "y"), (1, 1), 3))
    for text, prediction in zip(TEXTS, classify(TEXTS), strict=True):
        outputs = expected(classify, text)
        chosen = tuple(n for n, out in zip(classify.labels.names, outputs, strict=True) if out > 0)
        assert prediction.label == chosen
        shares = 1 / (1 + np.exp(-outputs))
        np.testing.assert_allclose(list(prediction.probabilities.values()), shares, rtol=1e-3)


def test_values_are_in_units_of_the_label(classifier):
    classify = classifier(Labels("regression", (), (), 3, mean=10.0, deviation=4.0), batch_size=8)
    for text, prediction in zip(TEXTS, classify(TEXTS), strict=True):
        assert prediction.label == pytest.approx(
            10 + 4 * float(expected(classify, text)[0]), rel=1e-3
        )
        assert prediction.probabilities == {}


def test_no_text_is_no_work(classifier):
    assert classifier(Labels("single_label", ("x", "y"), (1, 1), 2))([]) == []
