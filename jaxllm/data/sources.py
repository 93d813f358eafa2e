"""Sources of documents: files by path or glob, and text that needs no download."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxllm.data.builtin import BUILTIN_PREFIX, builtin_source
from jaxllm.data.documents import BadLine, Document, Source, content_group, split_spans
from jaxllm.errors import UserError

Text = tuple[int, str | None, str]
"""Line number, and either the text of the record and "", or None and what is wrong with it."""

_PIECE_BYTES = 1 << 16
_FINGERPRINT_BLOCKS = 64


def parse_sources(spec: str, field: str, parse_special_tokens: bool) -> list[Source]:
    """The sources of a comma string such as `"corpus/*.jsonl,builtin:pydocs"`.

    Args:
        spec: the comma string.
        field: the configuration field it comes from, for messages.
        parse_special_tokens: see `DataConfig`; built-in sources never hold such marks.

    Raises:
        UserError: an entry names no existing file, a file of an unknown format, or an unknown
            built-in source.
    """
    entries = [entry.strip() for entry in spec.split(",") if entry.strip()]
    return [_parse_source(entry, field, parse_special_tokens) for entry in entries]


def _parse_source(entry: str, field: str, parse_special_tokens: bool) -> Source:
    if entry.startswith(BUILTIN_PREFIX):
        return builtin_source(entry, field)
    is_glob = glob.has_magic(entry) and not Path(entry).exists()
    files = (
        [Path(p) for p in sorted(glob.glob(entry, recursive=True))] if is_glob else [Path(entry)]
    )
    files = [path for path in files if path.is_file()]
    if not files:
        problem = "the pattern matches no file" if is_glob else "there is no such file"
        raise UserError(f"config.{field}: {entry}: {problem}.")
    for path in files:
        if path.suffix not in READERS:
            known = ", ".join(READERS)
            raise UserError(f"config.{field}: {path}: is of no known format ({known}).")
    return FileSource(entry, tuple(files), parse_special_tokens)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Text files, read as streams."""

    name: str
    files: tuple[Path, ...]
    parse_special_tokens: bool

    def fingerprint(self) -> str:
        """Hash of each file's name, size and content.

        Of a file over 64 MiB, as many blocks of a megabyte are read, spread evenly over it: a
        change of the same size that falls between them is not seen.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files:
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            with path.open("rb") as file:
                for block in range(_FINGERPRINT_BLOCKS):
                    file.seek(max(block << 20, block * size // _FINGERPRINT_BLOCKS))
                    digest.update(file.read(1 << 20))
        return digest.hexdigest()

    def records(self) -> Iterator[list[Document] | BadLine]:
        """The documents of each record, or what is wrong with it."""
        for path in self.files:
            for line, text, problem in READERS[path.suffix](path):
                if text is None:
                    yield BadLine(str(path), line, problem)
                else:
                    yield self._documents(path, line, text)

    def _documents(self, path: Path, line: int, text: str) -> list[Document] | BadLine:
        try:
            texts = split_spans(text) if self.parse_special_tokens else [text]
        except ValueError as error:
            hint = "config.data.parse_special_tokens=False reads such marks as text"
            return BadLine(str(path), line, f"{error}; {hint}")
        texts = [text for text in texts if text.strip()]
        if not texts:
            return BadLine(str(path), line, "empty text")
        return [Document(text, content_group(text), self.name) for text in texts]


def read_jsonl(path: Path) -> Iterator[Text]:
    """Each line is an object with the string `text`."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, _text_of(line), ""
            except (ValueError, RecursionError) as error:
                yield number, None, _reason(error)


def read_txt(path: Path) -> Iterator[Text]:
    """The whole file is one text, or, if it is long, pieces that end at blank lines.

    Pieces let a single long file be divided into training and held-out text, and be read as a
    stream.
    """
    with path.open("rb") as lines:
        piece, size, first = [], 0, 1
        for number, line in enumerate(lines, start=1):
            piece.append(line)
            size += len(line)
            if (size >= _PIECE_BYTES and not line.strip()) or size >= 16 * _PIECE_BYTES:
                yield _decoded(b"".join(piece), first)
                piece, size, first = [], 0, number + 1
        if piece or first == 1:
            yield _decoded(b"".join(piece), first)


def _decoded(piece: bytes, line: int) -> Text:
    try:
        return line, piece.decode("utf-8-sig"), ""
    except ValueError as error:
        return line, None, _reason(error)


READERS: dict[str, Callable[[Path], Iterator[Text]]] = {".jsonl": read_jsonl, ".txt": read_txt}
"""File formats by suffix."""


def _text_of(line: bytes) -> str:
    if not line.strip():
        raise ValueError("empty line")
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    if "text" not in record:
        raise ValueError("no field `text`")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is not a string but {type(text).__name__}")
    text.encode()  # JSON can spell lone surrogates, which are no text
    return text


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return "not Unicode text (a lone surrogate)"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    return str(error)
