"""Tokens a second of the input pipeline, one thread, with nothing else to do.

    python benchmarks/input_pipeline.py [--seq_len=1024] [--batch_size=32]

Rows are packed from a store of made-up documents; each stage contains the ones above it. The
figures are medians of several repeats.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxllm.data.batches import BatchSource
from jaxllm.data.rows import PackedRows
from jaxllm.data.shuffle import ShuffledEpochs
from jaxllm.data.store import ShardCounts, TokenStore

TOKENS = 1 << 24
MEAN_DOCUMENT = 600  # tokens
REPEATS = 7


def make_store(path: Path) -> TokenStore:
    """A store of random tokens, with document lengths of a geometric distribution."""
    random = np.random.default_rng(0)
    lengths = 2 + random.geometric(1 / MEAN_DOCUMENT, TOKENS // MEAN_DOCUMENT)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(3, 1 << 15, offsets[-1], dtype=np.uint16)
    tokens[offsets[:-1]] = 1
    tokens[offsets[1:] - 1] = 2
    np.save(path / "tokens_00000.npy", tokens)
    np.save(path / "offsets_00000.npy", offsets)
    return TokenStore(path, "", 1 << 15, "uint16", (ShardCounts(len(tokens), len(lengths), 0),))


def tokens_per_second(work: Callable[[int], object], tokens_each: int, count: int) -> float:
    """Median over repeats of calling `work` with `count` successive numbers."""
    rates = []
    for repeat in range(REPEATS):
        started = time.perf_counter()
        for number in range(repeat * count, (repeat + 1) * count):
            work(number)
        rates.append(count * tokens_each / (time.perf_counter() - started))
    return statistics.median(rates)


def main() -> None:
    """Measures, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    seq_len, batch_size = options.seq_len, options.batch_size
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(make_store(Path(folder)), seq_len)
        dataset = ShuffledEpochs(rows, seed=0)
        # Without prefetching, a batch is made while the caller waits: one thread at work.
        batches = BatchSource(dataset, batch_size, sharding, prefetch=0)
        stages: dict[str, tuple[Callable[[int], object], int, int]] = {
            "packed rows, in order": (lambda k: rows[k % len(rows)], seq_len, 1024),
            "+ shuffled, repeated": (lambda k: dataset[k], seq_len, 1024),
            "+ stacked, put on the device": (batches, seq_len * batch_size, 32),
        }
        print(f"{f'rows of {seq_len}, batches of {batch_size}':<32}{'M tokens/s':>12}")
        for name, (work, tokens_each, count) in stages.items():
            print(f"{name:<32}{tokens_per_second(work, tokens_each, count) / 1e6:>12.1f}")
        batches.close()


if __name__ == "__main__":
    main()
