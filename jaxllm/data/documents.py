"""Documents from records: fields checked, spans divided, text cleaned, bad lines set aside."""

import hashlib
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.records import BadLine, Record, Source
from jaxllm.errors import UserError
from jaxllm.tokenizers.special_tokens import BOS, EOS

_LINES_BEFORE_JUDGING = 1000
_HOPELESS = 10  # times the bad lines allowed: good ones to come will hardly make up for it
_MARKER = re.compile(f"({re.escape(BOS)}|{re.escape(EOS)})")


class Document(NamedTuple):
    """One independent text: the unit of splitting, and a segment of a packed row."""

    text: str
    group: str
    """Documents of equal group stay on one side of the held-out split."""
    digest: bytes
    """Hash of what copies have alike: equal texts have equal ones."""
    source: int
    """Which of the sources it came from."""

    @classmethod
    def of(cls, text: str, group: str = "", source: int = 0, alike: str = "") -> "Document":
        """A document whose group, if none is given, is shared with its copies alone; see
        `Passage`."""
        digest = hashlib.blake2b((alike or text).encode(), digest_size=16).digest()
        return cls(text, group or digest.hex(), digest, source)


class Passage(NamedTuple):
    """What a reader makes of a record, or of a part of it: the text of a document."""

    text: str
    group: str = ""
    """See `Document`; empty: it is shared with copies of the text alone."""
    alike: str = ""
    """What copies have alike, where it is not the whole text."""


@runtime_checkable
class Reader(Protocol):
    """How a record becomes documents."""

    @property
    def names(self) -> tuple[str, ...]:
        """Tell it from readers that would read the same records otherwise; none of plain text."""
        ...

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """The passages of a record, cleaned; none where cleaning has left nothing.

        Args:
            record: what was read.
            marked: whether `<s>` and `</s>` in a text mark documents.
            clean: what is done to each text.

        Raises:
            ValueError: the record cannot be used; the message says why.
        """
        ...


class TextReader:
    """Reads the field `text`: what is pretrained on."""

    names: tuple[str, ...] = ()

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        return text_passages(record, marked, clean)


def text_passages(record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
    """The documents in the field `text` of a record; see `Reader`."""
    text = _text_field(record.fields)
    texts = [text for text in (_spans(text) if marked else [text]) if text.strip()]
    if not texts:
        raise ValueError("empty text")
    return [Passage(text, record.group) for text in map(clean, texts) if text]


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
        self._file.write(json.dumps(line._asdict()) + "\n")


def read_documents(
    sources: Iterable[Source],
    cleaner: Cleaner,
    max_bad_fraction: float = 1.0,
    rejected: RejectedLines | None = None,
    reader: Reader = TextReader(),  # noqa: B008
) -> Iterator[Document]:
    """The documents of all sources, in order, each cleaned.

    Args:
        sources: what to read.
        cleaner: what is done to each text; it counts what it does.
        max_bad_fraction: the share of bad lines that a source may have; judged at its end, and
            while reading as soon as there are lines enough to judge by.
        rejected: where bad lines go; None passes over them, for text that was read before.
        reader: what a record is read as.

    Raises:
        UserError: a source has too many bad lines, or cannot be read.
    """
    for number, source in enumerate(sources):
        lines = bad = 0
        first = None
        for record in source.records():
            lines += 1
            passages = _passages(reader, record, source.marked, cleaner)
            if not isinstance(passages, BadLine):
                yield from (Document.of(p.text, p.group, number, p.alike) for p in passages)
            elif rejected is not None:
                bad += 1
                first = first or passages
                rejected.add(passages)
                if lines >= _LINES_BEFORE_JUDGING and bad > _HOPELESS * max_bad_fraction * lines:
                    break
        if rejected is not None and first is not None and bad > max_bad_fraction * lines:
            raise UserError(
                f"{source.name}: {bad} of the {lines} lines read are bad, more than "
                f"config.data.max_bad_fraction={max_bad_fraction:g} allows; the first is "
                f"{first.file}:{first.line} ({first.reason}); see {rejected.path}."
            )


def _passages(
    reader: Reader, record: Record | BadLine, marked: bool, cleaner: Cleaner
) -> list[Passage] | BadLine:
    """What is read of a record, or why it cannot be used."""
    if isinstance(record, BadLine):
        return record
    try:
        return reader(record, marked, cleaner)
    except ValueError as error:
        return BadLine(record.file, record.line, str(error))


def _text_field(fields: Mapping[str, Any]) -> str:
    if "text" not in fields:
        raise ValueError(f"no field `text` (it has {', '.join(map(str, fields)) or 'none'})")
    text = fields["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode text (a lone surrogate)") from None
    return text


def _spans(text: str) -> list[str]:
    try:
        return split_spans(text)
    except ValueError as error:
        hint = "config.data.parse_special_tokens=False reads such marks as text"
        raise ValueError(f"{error}; {hint}") from None
