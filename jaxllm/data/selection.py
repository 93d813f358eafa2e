"""Which documents a configuration trains on and holds out: read, cleaned, divided, remembered."""

import array
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from jaxllm.data.cleaning import CLEANING_VERSION, Cleaner, CleaningConfig
from jaxllm.data.config import SourcesConfig
from jaxllm.data.documents import (
    Document,
    Reader,
    RejectedLines,
    TextReader,
    read_documents,
)
from jaxllm.data.mixture import parse_entries
from jaxllm.data.records import Source
from jaxllm.data.sources import make_source
from jaxllm.data.split import (
    DROPPED,
    HELD_OUT,
    SPLIT_VERSION,
    TRAIN,
    Sides,
    divide,
    keep_apart,
)
from jaxllm.errors import UserError
from jaxllm.files import write_json

Report = Callable[[str, int, int], None]
"""Progress: called with a phase (`read`, `train tokenizer`, `tokenise`), the UTF-8 bytes done,
and the bytes in all, 0 while they are not known. A phase begins with 0 done and ends with all
done; one whose result is reused is not reported at all."""

REJECTED_FILE = "rejected.jsonl"
EVAL = "eval"
"""The name of the token store of held-out text."""

_DOCUMENTS_FILE = "documents.json"
_SIDES_FILE = "sides.npy"
_DIGESTS_FILE = "digests.npy"
_REPORT_EVERY = 1 << 20  # bytes

Digests = UInt32[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True)
class SplitDocuments:
    """The documents of a configuration, and the side of the held-out split each is on."""

    fingerprint: str
    """Hash of the sources and of every option that decides which text is on which side."""
    sources: tuple[Source, ...]
    """Held-out sources first, so that reading them again ends before the training text."""
    held_out_sources: int
    """How many of `sources` are held-out ones."""
    cleaning: CleaningConfig
    sides: Sides
    digests: Digests
    """A few bits of each document's hash, to notice that a source has changed."""
    train_bytes: int
    eval_bytes: int
    bad_lines: int
    cleaned: dict[str, int]
    """Texts that each step of cleaning has changed or left out; steps that met none are absent."""
    reader: Reader
    """What records are read as."""

    def documents(self) -> Iterator[tuple[Document, int]]:
        """Every document that is kept, with its side, read from the sources again.

        Raises:
            UserError: a source does not hold the documents any more that were divided.
        """
        kept = int(np.flatnonzero(self.sides != DROPPED)[-1]) + 1  # stop reading after the last
        documents = read_documents(self.sources, Cleaner(self.cleaning), reader=self.reader)
        known = zip(self.sides[:kept].tolist(), self.digests[:kept].tolist(), strict=True)
        for side, digest in known:
            document = next(documents, None)
            if document is None or _short_digest(document) != digest:
                names = ", ".join(source.name for source in self.sources)
                raise UserError(
                    f"the text of {names} has changed since it was divided into training and "
                    "held-out text; run the command again once nothing writes to it."
                )
            if side != DROPPED:
                yield document, side

    def texts(self, side: int) -> Iterator[str]:
        """The texts of one side in order, read from the sources again."""
        wanted = int((self.sides == side).sum())
        for document, its_side in self.documents():
            if its_side == side:
                yield document.text
                wanted -= 1
                if not wanted:
                    return

    def store_of(self, document: Document, side: int) -> str:
        """The name of the token store that a kept document goes to."""
        return EVAL if side == HELD_OUT else train_store(document.source - self.held_out_sources)


def train_store(source: int) -> str:
    """The name of the token store of a training source, by its number."""
    return f"train_{source:02d}"


def split_documents(
    data: SourcesConfig,
    stores: Path,
    work_dir: Path,
    report: Report,
    reader: Reader = TextReader(),  # noqa: B008
) -> SplitDocuments:
    """The split made before from the same sources and options, or a new one.

    Raises:
        UserError: a source is wrong, there is no text, none is left to train on, or too many
            lines are bad.
    """
    train = parse_sources(data.train, "data.train", data.parse_special_tokens)
    evaluation = parse_sources(data.eval, "data.eval", data.parse_special_tokens)
    fraction = None if evaluation else data.eval_fraction
    split = _selected(data, train, evaluation, [fraction], stores, work_dir, report, reader)
    if not split.train_bytes:
        raise UserError(
            f"config.data.train: nothing of {data.train} is left to train on; all of it is held "
            "out, or was left out by config.data.cleaning."
        )
    return split


def held_out_documents(
    data: SourcesConfig,
    stores: Path,
    work_dir: Path,
    report: Report,
    reader: Reader = TextReader(),  # noqa: B008
) -> SplitDocuments:
    """The documents of `data.eval` alone, all of them held out, read now or before.

    Raises:
        UserError: a source is wrong, there is no text, or too many lines are bad.
    """
    evaluation = parse_sources(data.eval, "data.eval", data.parse_special_tokens)
    return _selected(data, [], evaluation, [], stores, work_dir, report, reader)


def _selected(
    data: SourcesConfig,
    train: list[Source],
    evaluation: list[Source],
    options: list[Any],
    stores: Path,
    work_dir: Path,
    report: Report,
    reader: Reader,
) -> SplitDocuments:
    """What is remembered of the documents of these sources; else they are read now.

    `options` are what the selection depends on beside sources and cleaning.
    """
    fingerprint = fingerprint_of(
        [(source.name, source.fingerprint(), source.marked) for source in train],
        [(source.name, source.fingerprint(), source.marked) for source in evaluation],
        (options, data.max_bad_fraction, dataclasses.asdict(data.cleaning)),
        (SPLIT_VERSION, CLEANING_VERSION),
        *reader.names,
    )
    folder = stores / fingerprint
    sources = (*evaluation, *train)
    try:
        counts = json.loads((folder / _DOCUMENTS_FILE).read_text())
        sides, digests = np.load(folder / _SIDES_FILE), np.load(folder / _DIGESTS_FILE)
        split = SplitDocuments(
            fingerprint,
            sources,
            len(evaluation),
            data.cleaning,
            sides,
            digests,
            reader=reader,
            **counts,
        )
        if (folder / REJECTED_FILE).exists() and not (work_dir / REJECTED_FILE).exists():
            work_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / REJECTED_FILE, work_dir / REJECTED_FILE)
        return split
    except (OSError, EOFError, ValueError, TypeError):  # not made yet, or damaged
        pass
    with RejectedLines(work_dir / REJECTED_FILE) as rejected:
        meter = Meter("read", 0, report)
        reading = _Reading(data, rejected, meter, reader)
        sides = reading.sides(train, evaluation)
        meter.finish()
    sizes, digests = np.array(reading.sizes, np.int64), np.array(reading.digests, np.uint32)
    counts = {
        "train_bytes": int(sizes[sides == TRAIN].sum()),
        "eval_bytes": int(sizes[sides == HELD_OUT].sum()),
        "bad_lines": rejected.bad,
        "cleaned": dict(reading.cleaner.counts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if rejected.bad:
        shutil.copyfile(rejected.path, folder / REJECTED_FILE)
    np.save(folder / _SIDES_FILE, sides)
    np.save(folder / _DIGESTS_FILE, digests)
    write_json(folder / _DOCUMENTS_FILE, counts)  # last: it says that the rest is whole
    return SplitDocuments(
        fingerprint,
        sources,
        len(evaluation),
        data.cleaning,
        sides,
        digests,
        reader=reader,
        **counts,
    )


class _Reading:
    """Reads sources for the first time, and keeps size and digest of each document."""

    def __init__(
        self, data: SourcesConfig, rejected: RejectedLines, meter: "Meter", reader: Reader
    ):
        self.cleaner = Cleaner(data.cleaning)
        self.sizes = array.array("q")
        self.digests = array.array("L")
        self._data, self._rejected, self._meter, self._reader = data, rejected, meter, reader

    def sides(self, train: list[Source], evaluation: list[Source]) -> Sides:
        """The side of each document, held-out sources first."""
        data, counts = self._data, self.cleaner.counts
        if not evaluation:
            documents = self._documents(train, "data.train", data.train)
            return divide(documents, data.eval_fraction, data.cleaning, counts)
        held_out = self._documents(evaluation, "data.eval", data.eval)
        if not train:
            return np.full(sum(1 for _ in held_out), HELD_OUT, np.uint8)
        training = self._documents(train, "data.train", data.train)
        return keep_apart(held_out, training, data.cleaning, counts)

    def _documents(self, sources: list[Source], field: str, names: str) -> Iterator[Document]:
        before, limit = len(self.sizes), self._data.max_bad_fraction
        for document in read_documents(sources, self.cleaner, limit, self._rejected, self._reader):
            self.sizes.append(len(document.text.encode()))
            self.digests.append(_short_digest(document))
            self._meter.add(self.sizes[-1])
            yield document
        if len(self.sizes) == before:
            raise UserError(f"config.{field}: there is no text in {names}.")


def _short_digest(document: Document) -> int:
    return int.from_bytes(document.digest[:4], "big")


def parse_sources(spec: str, field: str, parse_special_tokens: bool) -> list[Source]:
    """The sources of a comma string, weights left aside.

    Raises:
        UserError: an entry is wrong; `field` is named.
    """
    entries = parse_entries(spec, field)
    if field == "data.eval" and any(entry.weight is not None for entry in entries):
        raise UserError(f"config.{field}: held-out text is read whole; leave the weights out.")
    return [make_source(entry.name, field, parse_special_tokens) for entry in entries]


class Meter:
    """Reports bytes done, a megabyte at a time."""

    def __init__(self, phase: str, total: int, report: Report):
        self._phase, self._total, self._report = phase, total, report
        self._done = self._reported = 0
        report(phase, 0, total)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done - self._reported >= _REPORT_EVERY:
            self._reported = self._done
            self._report(self._phase, self._done, self._total)

    def texts(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self.add(len(text.encode()))

    def finish(self) -> None:
        self._report(self._phase, self._done, self._done)


def fingerprint_of(*values: Any) -> str:
    """Hash of values that JSON can write."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
