"""Which documents a configuration trains on and holds out: read, cleaned, divided, remembered."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxllm.data.cleaning import CLEANING_VERSION, Cleaner, CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.documents import Document, RejectedLines, read_documents
from jaxllm.data.mixture import parse_entries
from jaxllm.data.records import Source
from jaxllm.data.sources import make_source
from jaxllm.data.split import HELD_OUT, SPLIT_VERSION, TRAIN, Sides, divide, keep_apart
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
_REPORT_EVERY = 1 << 20  # bytes


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
    train_bytes: int
    eval_bytes: int
    bad_lines: int
    cleaned: dict[str, int]
    """Texts that each step of cleaning has changed or left out; steps that met none are absent."""

    def documents(self) -> Iterator[tuple[Document, int]]:
        """Every document that is kept, with its side, read from the sources again."""
        kept = np.flatnonzero((self.sides == TRAIN) | (self.sides == HELD_OUT))
        sides = self.sides[: kept[-1] + 1]  # stop reading after the last one
        documents = read_documents(self.sources, Cleaner(self.cleaning))
        for document, side in zip(documents, sides.tolist(), strict=False):
            if side in (TRAIN, HELD_OUT):
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
    data: DataConfig, stores: Path, work_dir: Path, report: Report
) -> SplitDocuments:
    """The split made before from the same sources and options, or a new one.

    Raises:
        UserError: a source is wrong, there is no text, or too many lines are bad.
    """
    train = parse_sources(data.train, "data.train", data.parse_special_tokens)
    evaluation = parse_sources(data.eval, "data.eval", data.parse_special_tokens)
    fingerprint = fingerprint_of(
        [(source.name, source.fingerprint(), source.marked) for source in train],
        [(source.name, source.fingerprint(), source.marked) for source in evaluation],
        (data.eval_fraction, data.max_bad_fraction, dataclasses.asdict(data.cleaning)),
        (SPLIT_VERSION, CLEANING_VERSION),
    )
    folder = stores / fingerprint
    try:
        counts = json.loads((folder / _DOCUMENTS_FILE).read_text())
        sides = np.load(folder / _SIDES_FILE)
        if (folder / REJECTED_FILE).exists() and not (work_dir / REJECTED_FILE).exists():
            work_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / REJECTED_FILE, work_dir / REJECTED_FILE)
    except (OSError, EOFError, ValueError):
        with RejectedLines(work_dir / REJECTED_FILE) as rejected:
            meter = Meter("read", 0, report)
            cleaner = Cleaner(data.cleaning)
            sides, sizes = _read_sides(data, train, evaluation, cleaner, rejected, meter)
            meter.finish()
        counts = {
            "train_bytes": int(sizes[sides == TRAIN].sum()),
            "eval_bytes": int(sizes[sides == HELD_OUT].sum()),
            "bad_lines": rejected.bad,
            "cleaned": dict(cleaner.counts),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if rejected.bad:
            shutil.copyfile(rejected.path, folder / REJECTED_FILE)
        np.save(folder / _SIDES_FILE, sides)
        write_json(folder / _DOCUMENTS_FILE, counts)  # last: it says that the rest is whole
    return SplitDocuments(
        fingerprint, (*evaluation, *train), len(evaluation), data.cleaning, sides, **counts
    )


def _read_sides(
    data: DataConfig,
    train: list[Source],
    evaluation: list[Source],
    cleaner: Cleaner,
    rejected: RejectedLines,
    meter: "Meter",
) -> tuple[Sides, Int64[np.ndarray, " documents"]]:
    """The side of each document, and its UTF-8 bytes."""
    sizes: list[int] = []

    def documents(sources: list[Source], field: str, names: str) -> Iterator[Document]:
        before = len(sizes)
        for document in read_documents(sources, cleaner, data.max_bad_fraction, rejected):
            sizes.append(len(document.text.encode()))
            meter.add(sizes[-1])
            yield document
        if len(sizes) == before:
            raise UserError(f"config.{field}: there is no text in {names}.")

    training = documents(train, "data.train", data.train)
    if evaluation:
        held_out = documents(evaluation, "data.eval", data.eval)
        sides = keep_apart(held_out, training, data.cleaning, cleaner.counts)
    else:
        sides = divide(training, data.eval_fraction, data.cleaning, cleaner.counts)
    return sides, np.array(sizes, np.int64)


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
