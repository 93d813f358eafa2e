"""What training draws: the same batch on any number of devices, and each document so many times."""

import collections
import itertools
import json
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.batches import BatchSource
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus
from jaxllm.data.training_rows import training_rows
from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig

SOURCES = {"a": 23, "b": 40, "c": 9}
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of documents that each hold a number of their own."""
    path = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    for source, count in SOURCES.items():
        with (path / f"{source}.jsonl").open("w") as file:
            for number in range(count):
                words = " ".join(str(rng.randrange(10**6)) for _ in range(rng.randint(1, 9)))
                file.write(json.dumps({"text": f"{source}{number}: {words}"}) + "\n")
    (path / "held_out.txt").write_text("nothing of this is trained on")
    return path


@pytest.fixture
def prepared(folder, tmp_path_factory, monkeypatch):
    """Makes the rows of a configuration, and the tokenizer."""
    monkeypatch.chdir(folder)

    def make(train, count=0, seed=0, **options):
        data = DataConfig(
            train=train,
            eval="held_out.txt",
            store=str(folder / "store"),
            **{"seq_len": 32} | options,
        )
        tokenizer = TokenizerConfig(kind="bytes", vocab_size=273)
        corpus = prepare_corpus(data, tokenizer, tmp_path_factory.mktemp("run"))
        return training_rows(data, corpus, seed, count), corpus

    return make


WEIGHTED = "a.jsonl@0.5:3,b.jsonl@0.3,c.jsonl@0.2"


def global_batches(rows, devices, steps):
    """Batches asked for in the order of `steps`, and whether each device holds its slice."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    source = BatchSource(rows.mixture, BATCH, NamedSharding(mesh, P("data")), prefetch=1)
    found = {}
    for step in steps:
        batch = source(step)
        share = BATCH // devices
        for name, array in batch.items():
            whole = np.asarray(array)
            for shard in array.addressable_shards:
                place = shard.index[0].start or 0
                assert shard.data.shape[0] == share
                np.testing.assert_array_equal(shard.data, whole[place : place + share])
            found[step, name] = whole.tobytes()
    source.close()
    return found


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize("train", [WEIGHTED, "a.jsonl,b.jsonl,c.jsonl"])
def test_the_batch_of_a_step_is_the_same_on_1_2_4_and_8_devices_and_after_seeking(
    prepared, packing, train
):
    if jax.device_count() < 8:
        pytest.skip("needs simulated devices")
    steps = [0, 1, 2, 30, 31, 500]
    expected = global_batches(prepared(train, packing=packing)[0], 1, steps)
    for devices, order in ((2, steps), (4, steps[::-1]), (8, [500, 1, 31, 0, 30, 2])):
        assert global_batches(prepared(train, packing=packing)[0], devices, order) == expected


def documents_in(rows, corpus, count):
    """How often the first `count` rows hold each document's text, whole."""
    seen: collections.Counter[str] = collections.Counter()
    for number in range(count):
        row = rows.mixture[number]
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            ids = [*row["tokens"][here].tolist(), int(row["targets"][here][-1])]
            if ids[0] == corpus.tokenizer.bos_id:
                ids = ids[: ids.index(corpus.tokenizer.eos_id)]
                seen[corpus.tokenizer.decode(ids)] += 1
    return seen


def texts(folder, source):
    lines = (folder / f"{source}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_document_is_seen_as_often_as_its_epochs_say(prepared, folder, packing):
    epochs = {"a": 3, "b": 1, "c": 5}
    train = "a.jsonl@5:3,b.jsonl@3:1,c.jsonl@2:5"
    rows, corpus = prepared(train, packing=packing, seq_len=128)
    seen = documents_in(rows, corpus, len(rows.mixture))
    expected = {text: epochs[name] for name in SOURCES for text in texts(folder, name)}
    assert seen == expected
    np.testing.assert_array_equal(rows.epochs(len(rows.mixture)), [3, 1, 5])


def test_without_weights_every_document_is_seen_once_an_epoch(prepared, folder):
    rows, corpus = prepared("a.jsonl,b.jsonl,c.jsonl", packing="best_fit", seq_len=128)
    size = sum(len(source) for source in rows.sources)
    for times in (1, 4):
        seen = documents_in(rows, corpus, times * size)
        assert seen == {text: times for name in SOURCES for text in texts(folder, name)}


def test_every_token_of_cut_rows_is_seen_as_often_as_its_epochs_say(prepared):
    rows, corpus = prepared("a.jsonl@1:2,b.jsonl@1:1", packing="concat")
    targets: collections.Counter[int] = collections.Counter()
    for number in range(len(rows.mixture)):
        row = rows.mixture[number]
        targets.update(row["targets"][row["loss_weights"] > 0].tolist())
    expected: collections.Counter[int] = collections.Counter()
    for store, epochs in zip(corpus.train, (2, 1), strict=True):
        tokens, offsets = np.asarray(store.tokens(0)), store.offsets(0)
        for begin, end in itertools.pairwise(offsets):
            expected.update(tokens[begin + 1 : end].tolist() * epochs)
    assert targets == expected


def test_shares_and_epochs_are_told_by_the_name_of_the_source(prepared):
    rows, _ = prepared(WEIGHTED)
    scalars = rows.scalars(20)
    assert scalars["data/source/a.jsonl/share"] == 0.5
    assert scalars["data/source/b.jsonl/share"] == 0.3
    sizes = dict(zip(rows.names, map(len, rows.sources), strict=True))
    assert scalars["data/source/c.jsonl/epochs"] == 4 / sizes["c.jsonl"]
    assert rows.scalars(0)["data/source/a.jsonl/share"] == 0.0


def test_a_source_smaller_than_a_row_is_told_and_can_be_packed_whole(prepared):
    with pytest.raises(UserError, match=r"c\.jsonl: gives \d+ tokens, less than a row of config"):
        prepared("a.jsonl,c.jsonl", seq_len=700)
    rows, _ = prepared("a.jsonl,c.jsonl", seq_len=700, packing="none")
    assert len(rows.sources[1]) == SOURCES["c"]


def test_limits_that_give_too_few_rows_are_told(prepared):
    with pytest.raises(UserError, match=r"config\.steps: the run wants 10,000 rows, but the sour"):
        prepared("a.jsonl,b.jsonl", count=10_000, max_epochs=2.0)
    prepared("a.jsonl,b.jsonl", count=20, max_epochs=2.0)


def test_a_limit_below_a_row_is_told(prepared):
    for train in ("a.jsonl@1:0.0001,b.jsonl@2:0.0001", "a.jsonl@1,b.jsonl@1:0.0005"):
        with pytest.raises(UserError, match=r"\.jsonl: 0\.000\d+ epochs of its .* less than a row"):
            prepared(train)
