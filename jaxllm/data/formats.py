"""File formats: a binary stream becomes records, by the suffix of its name."""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jaxllm.data.records import BadLine, Record
from jaxllm.tokenizers.special_tokens import BOS, EOS

MAX_LINE_BYTES = 16 << 20
"""A longer line of JSONL is a bad one; it is passed over without being held in memory."""

KNOWN_FORMATS = ".jsonl, .ndjson, .txt, each also with .gz or .zst, and .parquet"

UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)
"""What reading a damaged, cut off or unreachable file raises."""

_PIECE_BYTES = 1 << 16
_LONGEST_CHUNK = 16 * _PIECE_BYTES  # of a .txt line: a longer one is cut
_BUFFER_BYTES = 1 << 18
_PARQUET_ROWS = 64  # in memory at once, as Python values: rows may be whole books


def is_known(file: str) -> bool:
    """Whether the suffix of `file` is one of a known format."""
    return _suffixes(file) is not None


def read_records(stream: io.IOBase, file: str, marked: bool) -> Iterator[Record | BadLine]:
    """The records of a file.

    Args:
        stream: its bytes; seekable if the format is Parquet.
        file: its path or URL, of a known format.
        marked: whether `<s>` and `</s>` mark documents, which plain text is not cut within.

    Raises:
        *UNREADABLE: the file is damaged or cut off.
    """
    suffixes = _suffixes(file)
    assert suffixes is not None
    suffix, compression = suffixes
    if suffix == _PARQUET:
        yield from read_parquet(stream, file)
        return
    with _buffered(stream, compression) as lines:
        if suffix == _TXT:
            yield from read_txt(lines, file, marked)
        else:
            yield from read_jsonl(lines, file)


def read_jsonl(lines: io.BufferedIOBase, file: str) -> Iterator[Record | BadLine]:
    """Each line is a JSON object."""
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = lines.readline(_BUFFER_BYTES)
            yield BadLine(file, number, f"longer than {MAX_LINE_BYTES >> 20} MiB")
            continue
        try:
            yield Record(_json_object(line), file, number)
        except (ValueError, RecursionError) as error:
            yield BadLine(file, number, _reason(error))


def read_txt(lines: io.BufferedIOBase, file: str, marked: bool) -> Iterator[Record | BadLine]:
    """The whole file is the field `text` of one record, or, if it is long, of a record a piece.

    Pieces let a single long file be divided into training and held-out text, and be read as a
    stream. They end at blank lines; where none comes, at the end of a line; and in a line of
    megabytes, between two characters; but within a `<s>…</s>` span, if `marked`, only once it is
    longer than any line may be. A record's line is the one that its piece begins in.
    """
    first, line = 1, 1
    chunks: list[bytes] = []
    size, open_spans, tail = 0, 0, b""
    is_start = True
    while chunk := lines.readline(_LONGEST_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        line += chunk.endswith(b"\n")
        if marked:  # a mark may lie across two chunks of a line
            open_spans += _opened(tail + chunk) - _opened(tail)
            tail = (tail + chunk)[-3:]
        longest = MAX_LINE_BYTES if open_spans > 0 else _LONGEST_CHUNK
        at_end = not chunk.strip() and open_spans <= 0
        if (size >= _PIECE_BYTES and at_end) or size >= longest:
            piece = b"".join(chunks)
            end = size - _unfinished_bytes(piece) - (_unfinished_mark(piece) if marked else 0)
            yield _text_record(piece[:end], file, first, is_start)
            chunks, size, first, is_start = [piece[end:]], size - end, line, False
            open_spans, tail = 0, chunks[0][-3:]
    if size or is_start:
        yield _text_record(b"".join(chunks), file, first, is_start)


def read_parquet(stream: io.IOBase, file: str) -> Iterator[Record | BadLine]:
    """Each row is a record, and its columns are the fields; nested columns are lists and dicts."""
    try:
        # Streams the pages of a row group, which may be larger than memory.
        table = pq.ParquetFile(
            stream, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except UnicodeDecodeError as error:
        raise OSError(f"a name of its columns is {_reason(error)}") from error
    number = 0
    for batch in table.iter_batches(_PARQUET_ROWS):
        for row in _rows(batch):
            number += 1
            yield BadLine(file, number, row) if isinstance(row, str) else Record(row, file, number)


_PARQUET = ".parquet"
_TXT = ".txt"
_LINES = (".jsonl", ".ndjson", _TXT)
_COMPRESSIONS = (".gz", ".zst")


def _suffixes(file: str) -> tuple[str, str] | None:
    """The suffix of a known format, and that of its compression or ""."""
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0]
    suffixes = [suffix.lower() for suffix in PurePosixPath(file).suffixes[-2:]]
    if suffixes and suffixes[-1] == _PARQUET:
        return _PARQUET, ""
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in _LINES else None


@contextlib.contextmanager
def _buffered(stream: io.IOBase, compression: str) -> Iterator[io.BufferedIOBase]:
    """The bytes that a stream holds, decompressed.

    Raises:
        EOFError: the file is empty, and no compressed file is.
    """
    # Streams of remote files are raw: `readline` of some of them takes no limit.
    raw = io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER_BYTES)
    if compression and not raw.peek(1):
        raise EOFError("it is empty")
    if compression == ".gz":
        yield gzip.GzipFile(fileobj=raw)
    elif compression == ".zst":
        # Unlike other readers it tells a file that is cut off.
        yield io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    else:
        yield raw


def _json_object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("empty line")
    text = line.removeprefix(codecs.BOM_UTF8).decode()
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    return record


def _text_record(piece: bytes, file: str, line: int, is_start: bool) -> Record | BadLine:
    try:
        text = (piece.removeprefix(codecs.BOM_UTF8) if is_start else piece).decode()
    except UnicodeDecodeError as error:
        return BadLine(file, line, _reason(error))
    return Record({"text": text}, file, line)


def _unfinished_bytes(piece: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character without finishing it."""
    for count, byte in enumerate(reversed(piece[-3:]), start=1):
        if byte >= 0xC0:  # the first byte of a character tells how many there are
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return count if count < length else 0
        if byte < 0x80:
            break
    return 0


def _unfinished_mark(piece: bytes) -> int:
    """How many bytes at the end begin a `<s>` or `</s>` without finishing it."""
    marks = (BOS.encode(), EOS.encode())
    lengths = (n for n in (3, 2, 1) if any(m[:n] == piece[-n:] and n < len(m) for m in marks))
    return next(lengths, 0)


def _opened(piece: bytes) -> int:
    """How many more spans begin in a piece than end."""
    return piece.count(BOS.encode()) - piece.count(EOS.encode())


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows as Python values; instead of one whose text is no text, why."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_row(batch.slice(index, 1)) for index in range(len(batch))]


def _row(batch: pa.RecordBatch) -> dict[str, Any] | str:
    """The values of a batch of one row, without those that Python cannot hold."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return _reason(error)
        except (ValueError, OverflowError):  # a date beyond the year 9999, a nanosecond
            continue
    return row


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return str(error)
