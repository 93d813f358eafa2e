"""The token store: tokenised documents as plain `.npy` shards, written once, memory-mapped.

A store is a folder:

    tokens_00000.npy    uint16 (vocabulary up to 65,536) or uint32: documents end to end
    offsets_00000.npy   int64: where each document starts in the shard, and the shard's length
    manifest.json       format version, fingerprint, vocabulary, dtype, and each shard's counts

A document is `bos`, its tokens, `eos`. Shards end at a document.
"""

import array
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from jaxllm.errors import UserError
from jaxllm.tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENS_PER_SHARD = 1 << 26
_BATCH_BYTES = 4 << 20  # of text, tokenised at once: enough to keep all cores busy

Tokens = UInt16[np.ndarray, " tokens"] | UInt32[np.ndarray, " tokens"]
Offsets = Int64[np.ndarray, " documents_and_end"]


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """What one shard holds."""

    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of text."""


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """An opened store; nothing is read before it is used."""

    path: Path
    fingerprint: str
    vocab_size: int
    dtype: str
    shards: tuple[ShardCounts, ...]

    @property
    def num_tokens(self) -> int:
        """All tokens, `bos` and `eos` of each document included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """All documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(shard.bytes for shard in self.shards)

    def tokens(self, shard: int) -> Tokens:
        """Memory map of a shard's tokens."""
        return np.load(self.path / f"tokens_{shard:05d}.npy", mmap_mode="r")

    def offsets(self, shard: int) -> Offsets:
        """Memory map of where a shard's documents start, and of its length."""
        return np.load(self.path / f"offsets_{shard:05d}.npy", mmap_mode="r")

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Opens the store in the folder `path`.

        Raises:
            UserError: there is no store, it is of another format version, or files of it are
                missing or cut short.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            version = manifest.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, and this is {FORMAT_VERSION}")
            shards = tuple(ShardCounts(**counts) for counts in manifest.pop("shards"))
            store = cls(path=path, shards=shards, **manifest)
            store._check_shards()
        except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a complete token store ({error}); delete the folder, and the "
                "next run makes it again."
            ) from None
        return store

    def _check_shards(self) -> None:
        for number, counts in enumerate(self.shards):
            tokens, offsets = self.tokens(number), self.offsets(number)
            if (len(tokens), len(offsets)) != (counts.tokens, counts.documents + 1):
                raise ValueError(f"shard {number} is not of the length that the manifest says")
            if tokens.dtype != self.dtype:
                raise ValueError(f"shard {number} holds {tokens.dtype}, not {self.dtype}")


def write_stores(
    folder: str | Path,
    names: Sequence[str],
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    fingerprint: str,
    *,
    progress: Callable[[int], None] = lambda bytes_done: None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    workers: int = 0,
) -> dict[str, TokenStore]:
    """Tokenises texts over several cores into new stores in `folder`, replacing what is there.

    The folder appears whole or not at all: it is written beside its place and renamed at the end;
    what a killed run left of such a folder is removed first. Which bytes are written depends
    neither on `workers` nor on timing.

    Args:
        folder: the folder to make, with a folder in it for each store.
        names: of the stores, also of those that get no text.
        texts: (name of the store, document), read once, as a stream.
        tokenizer: gives the ids, and `bos` and `eos` around each document.
        fingerprint: kept in the manifests, to tell whether a store is the one that is wanted.
        progress: called now and then with the UTF-8 bytes done so far.
        tokens_per_shard: a shard is closed by the document that brings it to this size.
        workers: threads that tokenise; 0: as many as there are cores.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {name: _ShardWriter(unfinished / name, dtype, tokens_per_shard) for name in names}
    bytes_done = 0
    for batch, encoded in _encoded(_batches(texts), tokenizer, workers):
        for (name, _, size), ids in zip(batch, encoded, strict=True):
            writers[name].add(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype), size)
            bytes_done += size
        progress(bytes_done)
    for writer in writers.values():
        writer.finish(fingerprint, tokenizer.vocab_size)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)
    return {name: TokenStore.open(folder / name) for name in names}


_Batch = list[tuple[str, str, int]]
"""Store, text, and UTF-8 bytes of the text."""


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[_Batch]:
    """Some megabytes at a time."""
    batch: _Batch = []
    total = 0
    for name, text in texts:
        size = len(text.encode())
        batch.append((name, text, size))
        total += size
        if total >= _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterable[_Batch], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[_Batch, list[list[int]]]]:
    """Each batch with its ids; the next is read while one is tokenised."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        pending: tuple[_Batch, Future[list[list[int]]]] | None = None
        for batch in batches:
            texts = [text for _, text, _ in batch]
            begun = batch, thread.submit(tokenizer.encode_batch, texts, workers=workers)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = begun
        if pending is not None:
            yield pending[0], pending[1].result()


class _ShardWriter:
    """Cuts a stream of documents into shards; where it cuts depends on the documents alone.

    Tokens are on disk as soon as they are added; kept are the places of documents, 8 bytes each.
    """

    def __init__(self, directory: Path, dtype: np.dtype, tokens_per_shard: int):
        directory.mkdir(parents=True)
        self._shards: list[ShardCounts] = []
        self._directory = directory
        self._dtype = dtype
        self._tokens_per_shard = tokens_per_shard
        self._file: IO[bytes] | None = None
        self._offsets = array.array("q", [0])
        self._bytes = 0

    def add(self, document: Tokens, num_bytes: int) -> None:
        if self._file is None:
            self._file = (self._directory / f"tokens_{len(self._shards):05d}.npy").open("w+b")
            self._write_header(self._file, 0)
        self._file.write(document.tobytes())
        self._offsets.append(self._offsets[-1] + len(document))
        self._bytes += num_bytes
        if self._offsets[-1] >= self._tokens_per_shard:
            self._finish_shard(self._file)

    def finish(self, fingerprint: str, vocab_size: int) -> None:
        """Finishes the shard under way, and writes last the manifest, which says all is there."""
        if self._file is not None:
            self._finish_shard(self._file)
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "vocab_size": vocab_size,
            "dtype": self._dtype.name,
            "shards": [dataclasses.asdict(counts) for counts in self._shards],
        }
        (self._directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _finish_shard(self, file: IO[bytes]) -> None:
        offsets = np.array(self._offsets, np.int64)
        file.seek(0)
        self._write_header(file, int(offsets[-1]))
        file.close()
        np.save(self._directory / f"offsets_{len(self._shards):05d}.npy", offsets)
        counts = ShardCounts(int(offsets[-1]), len(offsets) - 1, self._bytes)
        self._shards.append(counts)
        self._file, self._offsets, self._bytes = None, array.array("q", [0]), 0

    def _write_header(self, file: IO[bytes], tokens: int) -> None:
        # A header leaves room for any length, so that it can be written over.
        layout = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": layout, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
