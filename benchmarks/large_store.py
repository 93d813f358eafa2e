"""Opening, seeking and memory of a large token store.

    python benchmarks/large_store.py [--gigabytes=2] [--seq_len=1024]

Repeated text is tokenised by bytes (two bytes a token on disk) into a store of that size. Then, in
a process of its own for each packing, the store is opened, and batches are read from the beginning
and from the last step of a run of ten epochs, and rows from all over it. Memory is the growth of
the process since before the store was opened, without memory-mapped pages, which the kernel may
drop.
Needs the disk, and a minute or two.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxllm.data.mixture import Entry, mix
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore, write_stores
from jaxllm.reporting.tables import print_table
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

EPOCHS = 10
BATCH = 32


def make_store(folder: Path, gigabytes: float) -> TokenStore:
    """A store of repeated text in documents of many lengths."""
    pages = sys.modules["argparse"].__doc__ or ""
    lengths = np.random.default_rng(0).geometric(1 / 2000, 4096) % len(pages) + 1
    documents = [pages[:length] for length in lengths.tolist()]
    wanted, total = gigabytes * 1e9 / 2, sum(map(len, documents))
    repeats = round(wanted / total)
    texts = (("all", text) for _ in range(repeats) for text in documents)
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes", vocab_size=273), [])
    return write_stores(folder / "stores", ["all"], texts, tokenizer, "benchmark")["all"]


def memory(name: str) -> float:
    """Megabytes of `name` in /proc/self/status: RssAnon is the process's own memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(path: Path, packing: str, seq_len: int, results: "multiprocessing.Queue") -> None:
    """Opens and reads; puts seconds and megabytes into `results`."""
    before = memory("RssAnon")
    begin = time.perf_counter()
    rows = packed_rows(TokenStore.open(path), packing, seq_len)
    opened = time.perf_counter() - begin
    mixture = mix([rows], [Entry("all")], seed=0)
    last = EPOCHS * len(rows) - BATCH
    seconds = []
    for first in (0, last):
        begin = time.perf_counter()
        for row in range(BATCH):
            mixture[first + row]
        seconds.append(time.perf_counter() - begin)
    for first in range(0, last, max(1, last // 500)):
        mixture[first]
    results.put((packing, len(rows), rows.fill_rate, opened, *seconds, memory("RssAnon") - before))


def main() -> None:
    """Makes the store, measures, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--seq_len", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        store = make_store(Path(folder), options.gigabytes)
        print(f"{store.num_tokens:,} tokens in {time.perf_counter() - begin:.0f} s")
        cells = []
        for packing in ("concat", "best_fit", "none"):
            begin = time.perf_counter()
            packed_rows(store, packing, options.seq_len)  # makes the plan, once
            planned = time.perf_counter() - begin
            results = multiprocessing.get_context("spawn").Queue()
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(store.path, packing, options.seq_len, results)
            )
            process.start()
            name, rows, fill, opened, first, last, grown = results.get()
            process.join()
            seconds = (f"{value:.4f} s" for value in (planned, opened, first, last))
            cells.append((name, f"{rows:,}", f"{fill:.1%}", *seconds, f"{grown:.1f} MB"))
        print_table(
            (
                "packing",
                "rows",
                "filled",
                "planning",
                "opening",
                "first batch",
                "last step's batch",
                "memory grown",
            ),
            cells,
        )


if __name__ == "__main__":
    main()
