"""Data sets of TensorFlow Datasets, prepared by the tests and read without TensorFlow."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxllm.data.records import BadLine, Record, Source
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError

EXAMPLES = [
    {
        "text": f"床 {i}",
        "label": ["no", "yes"][i % 2],
        "score": i / 2,
        "is_good": i > 2,
        "nested": {"numbers": [i, i + 1]},
        "responses": ["a"] * i,
        "messages": [{"role": "user", "content": str(k)} for k in range(i)],
        "turns": [{"role": "user", "at": [k, k]} for k in range(i)],
    }
    for i in range(6)
]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.9.0")
    SUPPORTED_VERSIONS = [tfds.core.Version("1.10.0")]

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}


class MyText(_Builder, skip_registration=True):
    """With every kind of feature that a record may hold."""

    name = "my_text"

    def _info(self):
        text = tfds.features.Text()
        pair = tfds.features.Tensor(shape=(2,), dtype=np.int64)
        features = {
            "text": text,
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "score": np.float32,
            "is_good": np.bool_,
            "nested": {"numbers": pair},
            "responses": tfds.features.Sequence(text),
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "turns": tfds.features.Dataset({"role": text, "at": pair}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        yield from enumerate(EXAMPLES[:count])


class MyChoice(_Builder, skip_registration=True):
    """In two configurations; some text is not UTF-8."""

    name = "my_choice"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="other")]

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": b"a\xff" if i == 1 else f"{self.builder_config.name} {i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data folder of all that the tests read."""
    root = tmp_path_factory.mktemp("prepared")
    options = {"data_dir": str(root), "file_format": "array_record"}
    for version in ("1.9.0", "1.10.0"):
        MyText(version=version, **options).download_and_prepare()
    for config in ("plain", "other"):
        MyChoice(config=config, **options).download_and_prepare()
    return root


@pytest.fixture
def source(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return lambda entry, marked=True: make_source(entry, "data.train", marked)


def test_features_become_the_values_of_python(source):
    made = source("tfds:my_text")
    assert isinstance(made, Source)
    records = list(made.records())
    assert [record.line for record in records] == [1, 2, 3, 4, 5, 6]
    assert {record.file for record in records} == {"tfds:my_text"}
    expected = [example | {"label": i % 2} for i, example in enumerate(EXAMPLES)]
    fields = sorted((record.fields for record in records), key=lambda fields: fields["score"])
    assert fields == expected
    json.dumps(fields)  # no bytes and no arrays are left
    assert list(made.records()) == records


def test_a_source_has_its_entry_for_a_name_and_is_marked_as_asked(source):
    for marked in (True, False):
        made = source("tfds:my_text:test", marked)
        assert (made.name, made.marked) == ("tfds:my_text:test", marked)


@pytest.mark.parametrize(
    ("split", "count"),
    [("", 6), (":test", 2), (":train[:50%]", 3), (":train[1:3]", 2), (":train+test", 8)],
)
def test_splits_and_their_slices(source, split, count):
    records = list(source(f"tfds:my_text{split}").records())
    assert len(records) == count
    if "[1:3]" in split:
        everything = [record.fields for record in source("tfds:my_text").records()]
        assert [record.fields for record in records] == everything[1:3]


def test_a_name_may_leave_out_configuration_and_version_or_be_a_path(source, prepared):
    newest = prepared / "my_text" / "1.10.0"
    assert source("tfds:my_text").folder == newest
    assert source("tfds:my_text/1.9.0").folder == prepared / "my_text" / "1.9.0"
    assert source(f"tfds:{newest}:test").folder == newest
    assert source(f"tfds:{prepared}/my_text").folder == newest
    assert source("tfds:my_choice/other").folder == prepared / "my_choice" / "other" / "1.9.0"
    assert source("tfds:my_choice/other/1.9.0").folder == source("tfds:my_choice/other").folder


def test_the_configuration_left_out_is_the_default_or_the_only_one(source, prepared, tmp_path):
    assert source("tfds:my_choice").folder == prepared / "my_choice" / "plain" / "1.9.0"
    copy = tmp_path / "my_choice"
    shutil.copytree(prepared / "my_choice", copy)
    shutil.rmtree(copy / ".config")
    choices = r"name one of its .*: tfds:.*my_choice/other, tfds:.*my_choice/plain"
    with pytest.raises(UserError, match=choices):
        source(f"tfds:{copy}")
    shutil.rmtree(copy / "plain")
    assert source(f"tfds:{copy}").folder == copy / "other" / "1.9.0"


def test_text_that_is_not_utf_8_is_a_bad_line(source):
    records = list(source("tfds:my_choice").records())
    (bad,) = (record for record in records if isinstance(record, BadLine))
    assert (bad.file, bad.reason) == ("tfds:my_choice", "not UTF-8 at byte 1 of a feature")
    assert records[bad.line - 1] == bad
    assert sum(isinstance(record, Record) for record in records) == 5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tfds:nothing", r"data\.train: tfds:nothing: no data set 'nothing' is prepared in .*path"),
        ("tfds:", "no data set '' is prepared"),
        ("tfds::test", "no data set '' is prepared"),
        ("tfds:my_text/2.0.0", "no data set 'my_text/2.0.0' is prepared"),
        ("tfds:my_text:trian", r"no split trian; its splits .* are train \(6\), test \(2\)"),
        ("tfds:my_text:train[5", r"no split train\[5; .*written train\[:10%\]"),
        ("tfds:my_text:train[9:2]", r"no split train\[9:2\]"),
        ("tfds:my_choice/.config", "holds no prepared version"),
    ],
)
def test_a_wrong_name_or_split_is_named(source, entry, message):
    with pytest.raises(UserError, match=message) as error:
        source(entry)
    assert "\n" not in str(error.value)


def test_a_format_that_needs_tensorflow_is_named(source, prepared, tmp_path):
    shutil.copytree(prepared / "my_text" / "1.9.0", tmp_path / "1.9.0")
    info = tmp_path / "1.9.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"without TensorFlow .*file_format='array_record'"):
        source(f"tfds:{tmp_path}/1.9.0")


def test_a_class_named_by_a_file_is_not_imported(source, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared / "my_text" / "1.9.0", tmp_path / "1.9.0")
    (tmp_path / "bystander.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    features = tmp_path / "1.9.0" / "features.json"
    own = "tensorflow_datasets.core.features.text_feature.Text"
    features.write_text(features.read_text().replace(own, "bystander.Text"))
    with pytest.raises(UserError, match=r"features\.json names bystander\.Text, .* not run"):
        source(f"tfds:{tmp_path}/1.9.0")
    features.write_text("{")
    with pytest.raises(UserError, match=r"features\.json"):
        source(f"tfds:{tmp_path}/1.9.0")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_shard_is_told(source, prepared, tmp_path, damage):
    shutil.copytree(prepared / "my_text" / "1.9.0", tmp_path / "1.9.0")
    (shard,) = (tmp_path / "1.9.0").glob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[300] ^= 255
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    made = source(f"tfds:{tmp_path}/1.9.0")
    with pytest.raises(UserError, match=r"read to example \d only .*prepare it again") as error:
        list(made.records())
    assert "\n" not in str(error.value)


def test_another_version_split_or_content_has_another_fingerprint(source, prepared, tmp_path):
    entries = ["tfds:my_text", "tfds:my_text/1.9.0", "tfds:my_text:test", "tfds:my_text:train[:3]"]
    prints = [source(entry).fingerprint() for entry in entries]
    assert len(set(prints)) == len(entries)
    assert source("tfds:my_text/1.10.0").fingerprint() == prints[0]
    copy = tmp_path / "1.10.0"
    shutil.copytree(prepared / "my_text" / "1.10.0", copy)
    assert source(f"tfds:{copy}").fingerprint() == prints[0]
    (shard,) = copy.glob("*train.array_record*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert source(f"tfds:{copy}").fingerprint() != prints[0]
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        source(f"tfds:{copy}").fingerprint()


def test_tensorflow_is_not_needed(source):
    list(source("tfds:my_text").records())
    assert "tensorflow" not in sys.modules
