"""The token store: tokenised documents as plain `.npy` shards, written once, memory-mapped.

A store is a folder:

    tokens_00000.npy    uint16 (vocabulary up to 65,536) or uint32: documents end to end
    offsets_00000.npy   int64: where each document starts in the shard, and the shard's length
    trained_00000.npy   bool, only where not all is learnt: which tokens a model is to predict
    parts_00000.npy     int64, only where documents have parts: where each part starts
    scores_00000.npy    float32, beside it: how good each part is
    manifest.json       format version, fingerprint, vocabulary, dtype, and each shard's counts

A document of text is `bos`, its tokens, `eos`. Shards end at a document.
"""

import array
import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt16, UInt32

from jaxllm.errors import UserError
from jaxllm.tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENS_PER_SHARD = 1 << 26
_BATCH_BYTES = 4 << 20  # of text, tokenised at once: enough to keep all cores busy

Tokens = UInt16[np.ndarray, " tokens"] | UInt32[np.ndarray, " tokens"]
Offsets = Int64[np.ndarray, " documents_and_end"]
Trained = Bool[np.ndarray, " tokens"]
Scores = Float32[np.ndarray, " parts"]


class Part(NamedTuple):
    """A part of a document, which sees none of the others: one of several responses."""

    length: int
    """In tokens."""
    score: float
    """How good it is, beside the others."""


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Sequence[int]
    trained: Sequence[bool] | None = None
    """Which of them are to be predicted; None: all but the first."""
    truncated: bool = False
    """Whether its end, or that of a part of it, was cut off."""
    parts: Sequence[Part] = ()
    """End to end, of all tokens but the last; none: the document is one."""


@runtime_checkable
class Encoder(Protocol):
    """Makes documents into tokens of which not all are learnt."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what it gives."""
        ...

    @property
    def ids_below(self) -> int:
        """More than any id that it gives."""
        ...

    @property
    def gives_parts(self) -> bool:
        """Whether the documents that it gives have parts."""
        ...

    def __call__(self, texts: Sequence[str], workers: int) -> list[Encoded | None]:
        """Each document as tokens; None if there is nothing in it to learn.

        Args:
            texts: documents as their reader gave them.
            workers: cores to use at most; 0: all.
        """
        ...


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
    masked: bool = False
    """Whether it says of each token if it is to be predicted; else all but `bos` are."""
    trained_tokens: int = -1
    """Tokens to be predicted, where it says so."""
    truncated: int = 0
    """Documents whose end was cut off."""
    dropped: int = 0
    """Documents that are not there, having nothing to be learnt."""
    most_parts: int = 0
    """Parts of a document at most; 0: documents have none."""

    @property
    def num_predicted(self) -> int:
        """Tokens that a model has to predict."""
        return self.trained_tokens if self.masked else self.num_tokens - self.num_documents

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

    def trained(self, shard: int) -> Trained:
        """Memory map of which tokens of a shard are to be predicted; of a masked store."""
        return np.load(self.path / f"trained_{shard:05d}.npy", mmap_mode="r")

    def parts(self, shard: int) -> Offsets:
        """Memory map of where the parts of a shard's documents start; of a store that has any."""
        return np.load(self.path / f"parts_{shard:05d}.npy", mmap_mode="r")

    def scores(self, shard: int) -> Scores:
        """Memory map of how good each part is."""
        return np.load(self.path / f"scores_{shard:05d}.npy", mmap_mode="r")

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
            if self.masked and len(self.trained(number)) != counts.tokens:
                raise ValueError(f"shard {number} does not say of each token if it is trained")
            if self.most_parts and len(self.parts(number)) != len(self.scores(number)):
                raise ValueError(f"shard {number} does not say of each part how good it is")


def write_stores(
    folder: str | Path,
    names: Sequence[str],
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    fingerprint: str,
    *,
    encoder: Encoder | None = None,
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
        encoder: makes tokens of the documents, and says which are to be predicted; None: they are
            texts, with `bos` and `eos` around them, of which all is.
        progress: called now and then with the UTF-8 bytes done so far.
        tokens_per_shard: a shard is closed by the document that brings it to this size.
        workers: threads that tokenise; 0: as many as there are cores.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    ids = encoder.ids_below if encoder else tokenizer.vocab_size
    dtype = np.dtype(np.uint16 if ids <= 1 << 16 else np.uint32)
    kinds = {"tokens": dtype}
    if encoder:
        kinds["trained"] = np.dtype(bool)
    if encoder and encoder.gives_parts:
        kinds |= {"parts": np.dtype(np.int64), "scores": np.dtype(np.float32)}
    writers = {name: _ShardWriter(unfinished / name, kinds, tokens_per_shard) for name in names}
    encode = encoder or functools.partial(_whole_texts, tokenizer)
    bytes_done = 0
    for batch, encoded in _encoded(_batches(texts), encode, workers):
        for (name, _, size), document in zip(batch, encoded, strict=True):
            writers[name].add(document, size)
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


def _whole_texts(tokenizer: Tokenizer, texts: Sequence[str], workers: int) -> list[Encoded | None]:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [Encoded([bos, *ids, eos]) for ids in tokenizer.encode_batch(texts, workers=workers)]


def _encoded(
    batches: Iterable[_Batch],
    encode: Callable[[Sequence[str], int], list[Encoded | None]],
    workers: int,
) -> Iterator[tuple[_Batch, list[Encoded | None]]]:
    """Each batch with its ids; the next is read while one is tokenised."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        pending: tuple[_Batch, Future[list[Encoded | None]]] | None = None
        for batch in batches:
            texts = [text for _, text, _ in batch]
            begun = batch, thread.submit(encode, texts, workers)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = begun
        if pending is not None:
            yield pending[0], pending[1].result()


class _ShardWriter:
    """Cuts a stream of documents into shards; where it cuts depends on the documents alone.

    Tokens are on disk as soon as they are added; kept are the places of documents, 8 bytes each.
    """

    def __init__(self, directory: Path, dtypes: Mapping[str, np.dtype], tokens_per_shard: int):
        directory.mkdir(parents=True)
        self._shards: list[ShardCounts] = []
        self._directory = directory
        self._dtypes = dtypes
        self._tokens_per_shard = tokens_per_shard
        self._files: dict[str, IO[bytes]] = {}
        self._lengths = dict.fromkeys(dtypes, 0)
        self._offsets = array.array("q", [0])
        self._bytes = 0
        self._trained = self._truncated = self._dropped = self._most_parts = 0

    def add(self, document: Encoded | None, num_bytes: int) -> None:
        if document is None:
            self._dropped += 1
            return
        if not self._files:
            for name, dtype in self._dtypes.items():
                path = self._directory / f"{name}_{len(self._shards):05d}.npy"
                self._files[name] = path.open("w+b")
                self._write_header(self._files[name], dtype, 0)
        self._truncated += document.truncated
        size = len(document.ids)
        self._write("tokens", document.ids)
        if "trained" in self._dtypes:
            trained = (
                [False] + [True] * (size - 1) if document.trained is None else document.trained
            )
            self._trained += sum(trained[1:])  # nothing comes before the first, to predict it from
            self._write("trained", trained)
        if "parts" in self._dtypes:
            lengths = [part.length for part in document.parts]
            assert sum(lengths) == size - 1, "parts are all of a document but its last token"
            starts = itertools.accumulate(lengths[:-1], initial=self._offsets[-1])
            self._write("parts", list(starts))
            self._write("scores", [part.score for part in document.parts])
            self._most_parts = max(self._most_parts, len(lengths))
        self._offsets.append(self._offsets[-1] + size)
        self._bytes += num_bytes
        if self._offsets[-1] >= self._tokens_per_shard:
            self._finish_shard()

    def finish(self, fingerprint: str, vocab_size: int) -> None:
        """Finishes the shard under way, and writes last the manifest, which says all is there."""
        if self._files:
            self._finish_shard()
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "vocab_size": vocab_size,
            "dtype": self._dtypes["tokens"].name,
            "shards": [dataclasses.asdict(counts) for counts in self._shards],
        }
        if "trained" in self._dtypes:
            manifest |= {
                "masked": True,
                "trained_tokens": self._trained,
                "truncated": self._truncated,
                "dropped": self._dropped,
            }
        if "parts" in self._dtypes:
            manifest["most_parts"] = self._most_parts
        (self._directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _finish_shard(self) -> None:
        offsets = np.array(self._offsets, np.int64)
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(file, self._dtypes[name], self._lengths[name])
            file.close()
        np.save(self._directory / f"offsets_{len(self._shards):05d}.npy", offsets)
        counts = ShardCounts(int(offsets[-1]), len(offsets) - 1, self._bytes)
        self._shards.append(counts)
        self._files, self._offsets, self._bytes = {}, array.array("q", [0]), 0
        self._lengths = dict.fromkeys(self._dtypes, 0)

    def _write(self, name: str, values: Sequence[Any]) -> None:
        self._files[name].write(np.array(values, self._dtypes[name]).tobytes())
        self._lengths[name] += len(values)

    def _write_header(self, file: IO[bytes], dtype: np.dtype, length: int) -> None:
        # A header leaves room for any length, so that it can be written over.
        layout = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": layout, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
