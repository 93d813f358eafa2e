"""Stores of made-up documents, and rows that are known by their number."""

import numpy as np
import pytest

from jaxllm.data.store import ShardCounts, TokenStore


class NumberedRows:
    """Row `i` of source `s` holds `s` and `i` and nothing else."""

    seq_len = 1
    fill_rate = 1.0

    def __init__(self, count, source=0):
        self.count, self.source = count, source

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return {"row": np.array([self.source, index])}


@pytest.fixture
def numbered_rows():
    return NumberedRows


@pytest.fixture
def make_store(tmp_path_factory):
    """Makes a store of documents of given lengths (2 or more), a list of lengths for each shard.

    Every token of it has a value of its own.
    """

    def make(*shards):
        path = tmp_path_factory.mktemp("store")
        counts, first = [], 0
        for number, lengths in enumerate(shards):
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            tokens = np.arange(first, first + offsets[-1], dtype=np.uint32)
            first += int(offsets[-1])
            np.save(path / f"tokens_{number:05d}.npy", tokens)
            np.save(path / f"offsets_{number:05d}.npy", offsets)
            counts.append(ShardCounts(len(tokens), len(lengths), 0))
        return TokenStore(path, "made up", 1 << 20, "uint32", tuple(counts))

    return make
