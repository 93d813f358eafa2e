"""The token store: tokenised documents as plain `.npy` shards, written once, memory-mapped.

A store is a folder:

    tokens_00000.npy    uint16 (vocabulary up to 65,536) or uint32: documents end to end
    offsets_00000.npy   int64: where each document starts in the shard, and the shard's length
    manifest.json       format version, fingerprint, vocabulary, dtype, and each shard's counts

A document is `bos`, its tokens, `eos`. Shards end at a document.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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


def write_store(
    path: str | Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    fingerprint: str,
    progress: Callable[[int], None] = lambda bytes_done: None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> TokenStore:
    """Tokenises `texts` over all cores into a new store at `path`, replacing what is there.

    The store appears whole or not at all: it is written into a folder beside it, which is renamed
    at the end; what a killed run left of such a folder is removed first.

    Args:
        path: the folder to make.
        texts: one document each, read as a stream.
        tokenizer: gives the ids, and `bos` and `eos` around each document.
        fingerprint: kept in the manifest, to tell whether a store is the one that is wanted.
        progress: called now and then with the UTF-8 bytes done so far.
        tokens_per_shard: a shard is closed by the document that brings it to this size.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writer = _ShardWriter(unfinished, dtype, tokens_per_shard)
    bytes_done = 0
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for ids, (_, size) in zip(encoded, batch, strict=True):
            writer.add(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype), size)
            bytes_done += size
        progress(bytes_done)
    writer.close()
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "shards": [dataclasses.asdict(counts) for counts in writer.shards],
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    os.rename(unfinished, path)
    return TokenStore.open(path)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, int]]]:
    """Texts with their UTF-8 sizes, some megabytes at a time."""
    batch, total = [], 0
    for text in texts:
        size = len(text.encode())
        batch.append((text, size))
        total += size
        if total >= _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Cuts a stream of documents into shards; where it cuts depends on the documents alone."""

    def __init__(self, directory: Path, dtype: np.dtype, tokens_per_shard: int):
        self.shards: list[ShardCounts] = []
        self._directory = directory
        self._dtype = dtype
        self._tokens_per_shard = tokens_per_shard
        self._start_shard()

    def _start_shard(self) -> None:
        self._documents: list[Tokens] = []
        self._tokens = 0
        self._bytes = 0

    def add(self, document: Tokens, num_bytes: int) -> None:
        self._documents.append(document)
        self._tokens += len(document)
        self._bytes += num_bytes
        if self._tokens >= self._tokens_per_shard:
            self.close()

    def close(self) -> None:
        """Writes the shard under way, if it holds anything."""
        if not self._documents:
            return
        number = len(self.shards)
        offsets = np.zeros(len(self._documents) + 1, np.int64)
        np.cumsum([len(document) for document in self._documents], out=offsets[1:])
        np.save(self._directory / f"tokens_{number:05d}.npy", np.concatenate(self._documents))
        np.save(self._directory / f"offsets_{number:05d}.npy", offsets)
        self.shards.append(ShardCounts(self._tokens, len(self._documents), self._bytes))
        self._start_shard()
