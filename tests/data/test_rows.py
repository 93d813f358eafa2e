"""Packed rows: known answers, and nothing of the store lost, repeated or mixed up."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.rows import PackedRows
from jaxllm.data.store import ShardCounts, TokenStore

BOS, EOS = 1, 2


def make_store(path, shards):
    """A store of shards of documents, each given by the number of its tokens, bos and eos in."""
    path.mkdir(exist_ok=True)
    counts, number = [], 10
    for index, lengths in enumerate(shards):
        documents = []
        for length in lengths:
            documents.append([BOS, *range(number, number + length - 2), EOS])
            number += length - 2
        np.save(
            path / f"tokens_{index:05d}.npy", np.array([*itertools.chain(*documents)], np.uint16)
        )
        np.save(path / f"offsets_{index:05d}.npy", np.cumsum([0, *lengths]))
        counts.append(ShardCounts(sum(lengths), len(lengths), 0))
    return TokenStore(path, "", 60_000, "uint16", tuple(counts))


def test_known_rows(tmp_path):
    store = make_store(tmp_path, [[5, 3, 4]])
    # 1 10 11 12 2 | 1 13 2 | 1 14 15 2
    rows = PackedRows(store, 4)
    assert len(rows) == 3
    expected = [
        {
            "tokens": [1, 10, 11, 12],
            "targets": [10, 11, 12, 2],
            "loss_weights": [1, 1, 1, 1],
            "segment_ids": [1, 1, 1, 1],
            "positions": [0, 1, 2, 3],
        },
        {
            "tokens": [2, 1, 13, 2],
            "targets": [1, 13, 2, 1],
            "loss_weights": [0, 1, 1, 0],
            "segment_ids": [1, 2, 2, 2],
            "positions": [0, 0, 1, 2],
        },
        {
            "tokens": [1, 14, 15, 0],
            "targets": [14, 15, 2, 0],
            "loss_weights": [1, 1, 1, 0],
            "segment_ids": [1, 1, 1, 0],
            "positions": [0, 1, 2, 0],
        },
    ]
    for index, row in enumerate(expected):
        got = {name: array.tolist() for name, array in rows[index].items()}
        assert got == row
    types = {name: array.dtype for name, array in rows[0].items()}
    assert types.pop("loss_weights") == np.float32
    assert set(types.values()) == {np.dtype(np.int32)}


def test_without_the_document_mask_a_row_is_one_segment(tmp_path):
    store = make_store(tmp_path, [[5, 3, 4]])
    masked, plain = PackedRows(store, 4), PackedRows(store, 4, document_mask=False)
    for index in range(3):
        for name in ("tokens", "targets", "loss_weights"):
            np.testing.assert_array_equal(plain[index][name], masked[index][name])
    assert plain[1]["segment_ids"].tolist() == [1, 1, 1, 1]
    assert plain[1]["positions"].tolist() == [0, 1, 2, 3]
    assert plain[2]["segment_ids"].tolist() == [1, 1, 1, 0]


@settings(max_examples=200)
@given(
    shards=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    seq_len=st.integers(1, 40),
)
def test_each_token_but_the_first_of_a_document_is_a_target_once(tmp_path_factory, shards, seq_len):
    store = make_store(tmp_path_factory.mktemp("store"), shards)
    rows = PackedRows(store, seq_len)
    targets = []
    for index in range(len(rows)):
        row = rows[index]
        assert all(array.shape == (seq_len,) for array in row.values())
        real = row["segment_ids"] > 0
        assert (np.diff(real.astype(int)) <= 0).all()  # padding is at the end
        assert not any(array[~real].any() for array in row.values())
        segment_ids, positions = row["segment_ids"][real], row["positions"][real]
        np.testing.assert_array_equal(np.unique(segment_ids), 1 + np.arange(segment_ids[-1]))
        for segment in range(1, segment_ids[-1] + 1):
            inside = segment_ids == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            starts = row["tokens"][real][inside] == BOS
            assert not starts[1:].any()
            assert segment == 1 or starts[0]
        weighted = row["loss_weights"] == 1
        assert not (weighted & ~real).any()
        targets += row["targets"][weighted].tolist()
        # What a weighted target continues is of the same document as the target itself.
        assert (row["tokens"][weighted] != EOS).all()
    stream = np.concatenate([store.tokens(n) for n in range(len(store.shards))])
    assert targets == stream[stream != BOS].tolist()


def test_indices_outside_are_refused(tmp_path):
    rows = PackedRows(make_store(tmp_path, [[5]]), 4)
    assert len(rows) == 1
    for index in (-1, 1):
        with pytest.raises(IndexError):
            rows[index]
