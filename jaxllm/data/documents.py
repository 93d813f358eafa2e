"""What a source yields (documents and bad lines), and reading with bad lines set aside."""

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from jaxllm.errors import UserError
from jaxllm.tokenizers.special_tokens import BOS, EOS

_LINES_BEFORE_JUDGING = 1000
_HOPELESS = 10  # times the bad lines allowed: good ones to come will hardly make up for it
_MARKER = re.compile(f"({re.escape(BOS)}|{re.escape(EOS)})")


@dataclasses.dataclass(frozen=True)
class Document:
    """One independent text: the unit of splitting, and a segment of a packed row."""

    text: str
    group: str
    """Documents of equal group stay on one side of the held-out split."""
    source: str
    """The entry of `data.train` or `data.eval` it came from."""


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A record that gives no document."""

    file: str
    line: int
    """Counted from 1; 0 when the whole file is one record."""
    reason: str


@runtime_checkable
class Source(Protocol):
    """An entry of `data.train` or `data.eval`."""

    @property
    def name(self) -> str:
        """The entry as it was written."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the documents may have; cheap next to reading them."""
        ...

    def records(self) -> Iterator[list[Document] | BadLine]:
        """Reads from the start: for each record its documents, or why it has none."""
        ...


def content_group(text: str) -> str:
    """The group of a text that belongs with nothing but copies of itself."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_spans(text: str) -> list[str]:
    """The texts of the `<s>…</s>` spans of a record, or the whole of one without markers.

    Raises:
        ValueError: the markers are not balanced, or text stands outside of them.
    """
    pieces = _MARKER.split(text)
    if len(pieces) == 1:
        return [text]
    if pieces[1::2] != [BOS, EOS] * (len(pieces) // 4) or len(pieces) % 4 != 1:
        raise ValueError(f"{BOS} and {EOS} do not alternate")
    if any(outside.strip() for outside in pieces[::4]):
        raise ValueError(f"text outside of {BOS}…{EOS}")
    return [inside for inside in pieces[2::4] if inside.strip()]


class RejectedLines:
    """Counts lines, and writes the bad ones as JSONL records of file, line and reason.

    The file exists only once there is a bad line to tell; one of an earlier reading is removed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bad = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> "RejectedLines":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, line: BadLine) -> None:
        """Sets one line aside."""
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        self.bad += 1
        # A file name may hold bytes that are not UTF-8: escaped by `ensure_ascii`.
        self._file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read_documents(
    sources: Iterable[Source], max_bad_fraction: float, rejected: RejectedLines | None = None
) -> Iterator[Document]:
    """The documents of all sources, in order.

    Args:
        sources: what to read.
        max_bad_fraction: the share of bad lines that a source may have; judged at its end, and
            while reading as soon as there are lines enough to judge by.
        rejected: where bad lines go; None passes over them, for text that was read before.

    Raises:
        UserError: a source has too many bad lines.
    """
    for source in sources:
        lines = 0
        bad: list[BadLine] = []
        for record in source.records():
            lines += 1
            if not isinstance(record, BadLine):
                yield from record
            elif rejected is not None:
                bad.append(record)
                rejected.add(record)
                if (
                    lines >= _LINES_BEFORE_JUDGING
                    and len(bad) > _HOPELESS * max_bad_fraction * lines
                ):
                    break
        if rejected is not None and len(bad) > max_bad_fraction * lines:
            raise UserError(
                f"{source.name}: {len(bad)} of the {lines} lines read are bad, more than "
                f"config.data.max_bad_fraction={max_bad_fraction:g} allows; the first is "
                f"{bad[0].file}:{bad[0].line} ({bad[0].reason}); see {rejected.path}."
            )
