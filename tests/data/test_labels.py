"""Labelled texts: what is read of records, what is refused, and where the label stands."""

import json

import numpy as np
import pytest

from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus
from jaxllm.data.labels import (
    LabelledKind,
    Labels,
    LabelsConfig,
    labels_of,
    read_label,
)
from jaxllm.data.packing import packed_rows
from jaxllm.data.records import Record
from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig

BYTES = TokenizerConfig(kind="bytes")


def read(fields, **config):
    reader = LabelledKind(LabelsConfig(**config)).reader
    return [json.loads(p.text) for p in reader(Record(fields, "f", 1), True, Cleaner(CLEANING))]


CLEANING = CleaningConfig(near_duplicates=0.0)


@pytest.fixture
def prepared(tmp_path):
    """A corpus of labelled texts, every fourth of them held out."""

    def make(train, held_out, seq_len=16, **config):
        for name, records in {"train": train, "eval": held_out}.items():
            lines = (json.dumps({"text": text, "label": label}) for text, label in records)
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data = DataConfig(
            train=str(tmp_path / "train.jsonl"),
            eval=str(tmp_path / "eval.jsonl"),
            seq_len=seq_len,
            packing="best_fit",
            cleaning=CLEANING,
        )
        kind = LabelledKind(LabelsConfig(**config))
        return prepare_corpus(data, BYTES, tmp_path / "work", kind=kind)

    return make


def test_records_are_read_by_the_fields_that_are_named():
    assert read({"text": "Hi", "label": "ham"}) == [{"text": "Hi", "label": "ham"}]
    assert read({"text": "Hi", "label": True}) == [{"text": "Hi", "label": "true"}]
    assert read({"a": "x", "b": "y", "c": 3}, text="a, b", label="c") == [
        {"text": "x\ny", "label": 3}
    ]
    several = {"text": "Hi", "label": ["b", "a", "b", 2]}
    assert read(several, kind="multi_label") == [{"text": "Hi", "label": [2, "a", "b"]}]
    assert read({"text": "Hi", "label": 2}, kind="regression") == [{"text": "Hi", "label": 2.0}]


def test_the_same_text_is_on_one_side_whatever_its_label():
    reader = LabelledKind(LabelsConfig()).reader
    one, other, third = (
        reader(Record({"text": text, "label": label}, "f", 1), False, Cleaner(CLEANING))[0]
        for text, label in (("Hi", 1), ("Hi", 2), ("Ho", 1))
    )
    assert one.group == other.group != third.group


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "a"}, "no field `text`"),
        ({"text": "Hi"}, "no field `label`"),
        ({"text": 3, "label": "a"}, "`text` is not a string"),
        ({"text": " ", "label": "a"}, "`text` is empty"),
        ({"text": "Hi", "label": None}, "no text and no whole number"),
        ({"text": "Hi", "label": ""}, "no text and no whole number"),
        ({"text": "Hi", "label": 1.5}, "kind=regression"),
        ({"text": "Hi", "label": ["a"]}, "kind=multi_label"),
        ({"text": "Hi", "label": "\ud800"}, "the label .* is not Unicode text"),
    ],
)
def test_a_record_without_text_or_label_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read(fields)


def test_labels_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="is no list of classes"):
        read_label("a", "multi_label")
    for value in ("2", True, float("nan"), None, 10**400):
        with pytest.raises(ValueError, match="is no number"):
            read_label(value, "regression")


def test_a_label_stands_behind_its_text_and_alone_is_predicted(prepared):
    corpus = prepared([("ab", "y"), ("c", "x"), ("d", "x")], [("e", "y")])
    labels = corpus.encoder.labels
    assert (labels.names, labels.counts, labels.texts) == (("x", "y"), (2, 1), 3)
    [row] = list(packed_rows(corpus.train[0], "best_fit", 16))
    tokenizer = corpus.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    assert row["tokens"][:10].tolist() == [bos, a, b, eos, bos, c, eos, bos, d, eos]
    assert np.flatnonzero(row["loss_weights"]).tolist() == [3, 6, 9]
    assert row["targets"][[3, 6, 9]].tolist() == [1, 0, 0]
    np.testing.assert_array_equal(corpus.encoder.targets, [[1, 0], [0, 1]])


def test_a_long_text_loses_its_end_and_keeps_its_label(prepared):
    corpus = prepared([("abcdefgh", "y"), ("c", "x")], [("e", "y")], seq_len=5)
    rows = packed_rows(corpus.train[0], "none", 5)
    row = rows[0]
    assert (row["segment_ids"] > 0).all()
    assert row["tokens"][-1] == corpus.tokenizer.eos_id
    assert (row["targets"][-1], row["loss_weights"][-1]) == (1, 1)
    assert corpus.train[0].truncated == 1


def test_sets_and_values_have_rows_in_a_table(prepared):
    several = prepared([("a", ["x", "y"]), ("b", []), ("c", ["y"])], [("d", ["x"])], 16,
                       kind="multi_label")  # fmt: skip
    table = several.encoder.table
    assert several.encoder.labels.counts == (1, 2)
    for label, row in {("x", "y"): [1, 1], (): [0, 0], ("y",): [0, 1], ("x",): [1, 0]}.items():
        np.testing.assert_array_equal(several.encoder.targets[table[label]], row)


def test_values_are_standardised_by_those_of_training(prepared):
    corpus = prepared([("a", 1.0), ("b", 3)], [("d", 7.0)], kind="regression")
    assert (corpus.encoder.labels.mean, corpus.encoder.labels.deviation) == (2, 1)
    assert corpus.encoder.labels.outputs == 1
    targets = corpus.encoder.targets[:, 0]
    assert [targets[corpus.encoder.table[value]] for value in (1.0, 3.0, 7.0)] == [-1, 1, 5]


@pytest.mark.slow
def test_more_labels_than_tokens_have_room(prepared):
    """Numbers of labels are kept as token ids, which a small vocabulary would hold in 16 bits."""
    values = [(f"text {n}", float(n)) for n in range(66_000)]
    corpus = prepared(values, [("d", 0.5)], kind="regression")
    assert corpus.train[0].dtype == "uint32"
    assert int(corpus.train[0].tokens(0).max()) == 65_999


def test_whole_numbers_are_in_order_before_texts():
    labels = labels_of([10, 9, "b", 10, "a", "a"], "single_label")
    assert labels.names == (9, 10, "a", "b")
    assert labels.counts == (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a", "a", "a"], "single_label", "all 3 training texts have the label 'a'"),
        ([(), (), ()], "multi_label", "all 3 training texts have the label"),
        ([("a",), ("a",)], "multi_label", "all 2 training texts have the label"),
        ([], "regression", "there is none"),
        ([1e308, -1e308], "regression", "the labels are too large"),
        ([1, "1", 2], "single_label", "1 is a label both as a number and as a text"),
        ([2.0, 2.0], "regression", "all 2 training texts have the label 2.0"),
        (["a", "b", "c"], "single_label", "each of the 3 training texts has a label of its own"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused(labels, kind, message):
    with pytest.raises(UserError, match=message):
        labels_of(labels, kind)


def test_a_label_that_no_training_text_has_is_told(prepared):
    with pytest.raises(UserError, match=r"that no training text has: 'z' \(2\); add training"):
        prepared([("a", "x"), ("b", "y"), ("c", "y")], [("d", "z"), ("e", "z"), ("f", "x")])


def test_labels_are_kept_as_they_were(tmp_path):
    labels = Labels("single_label", (3, "a"), (1, 2), 3)
    labels.save(tmp_path / "labels.json")
    assert Labels.load(tmp_path / "labels.json") == labels
    with pytest.raises(UserError, match="is no run of the stage classify"):
        Labels.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(UserError, match=r"broken\.json: cannot be read"):
        Labels.load(tmp_path / "broken.json")
