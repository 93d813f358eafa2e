"""The sources that a configuration names: files by path, glob or URL, data sets, built-in text."""

import dataclasses
import glob
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence

import fsspec
from fsspec.core import url_to_fs

from jaxllm.data.builtin import BUILTIN_PREFIX, builtin_source
from jaxllm.data.formats import KNOWN_FORMATS, UNREADABLE, is_known, read_records
from jaxllm.data.records import BadLine, Record, Source
from jaxllm.errors import UserError

TFDS_PREFIX = "tfds:"

_BLOCK_BYTES = 1 << 20
_LOCAL_BLOCKS = 64
_REMOTE_BLOCKS = 4  # each is a request
_BUDGET = 1 << 30  # bytes of all files of a source together: seconds
_SMALLEST_SHARE = 1 << 16  # of one file, however many there are


def make_source(entry: str, field: str, parse_special_tokens: bool) -> Source:
    """The source of one entry of a configuration field.

    Args:
        entry: `builtin:NAME…`, `tfds:NAME[:SPLIT]`, or a path, a glob (`**` is any folders) or a
            URL (`gs://`, `s3://`, `https://`, …) of files.
        field: the configuration field it comes from, such as `data.train`, for messages.
        parse_special_tokens: see `DataConfig`; built-in sources never hold such marks.

    Raises:
        UserError: an entry names no existing file, a file of an unknown format, a data set that
            is not prepared, an unknown built-in source, or needs a package that is missing.
    """
    if entry.startswith(BUILTIN_PREFIX):
        return builtin_source(entry, field)
    if entry.startswith(TFDS_PREFIX):
        from jaxllm.data.tfds_source import tfds_source  # half a second to import

        return tfds_source(entry, field, parse_special_tokens)
    files = _find_files(entry, f"config.{field}: {entry}")
    for file in files:
        if not is_known(file):
            raise UserError(f"config.{field}: {file}: is of no known format ({KNOWN_FORMATS}).")
    return FileSource(entry, parse_special_tokens, tuple(files))


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Files of known formats, read as streams."""

    name: str
    marked: bool
    files: tuple[str, ...]
    """Paths, or URLs."""

    def fingerprint(self) -> str:
        """Hash of the files, see `fingerprint_of_files`."""
        return fingerprint_of_files(self.files)

    def records(self) -> Iterator[Record | BadLine]:
        """The records of all files, in order."""
        for file in self.files:
            line = 0
            try:
                file_system, path = _file_system(file)
                with file_system.open(path, "rb") as stream:
                    for record in read_records(stream, file, self.marked):
                        line = record.line
                        yield record
            except _read_errors(file) as error:
                how_far = f"was read to line {line} only" if line else "cannot be read"
                raise UserError(
                    f"{file}: {how_far} ({one_line(error)}): it is damaged, cut off or out of "
                    "reach; make or fetch it again, or leave it out."
                ) from error


def fingerprint_of_files(files: Sequence[str]) -> str:
    """Hash of each file's name, size and content.

    Of all files together about a gibibyte is read, and of one at most 64 MiB (a remote one: 4
    MiB) in blocks spread evenly over it: a change of the same size that falls between them is not
    seen here.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    share = max(_SMALLEST_SHARE, _BUDGET // max(1, len(files)))
    for file in files:
        try:
            file_system, path = _file_system(file)
            size = file_system.size(path)
            if size is None:
                raise OSError("its server does not tell its size: download it first")
            digest.update(json.dumps([posixpath.basename(file), size]).encode())
            blocks = _REMOTE_BLOCKS if _is_remote(file) else _LOCAL_BLOCKS
            for start, end in _sampled_blocks(size, blocks, share):
                digest.update(file_system.cat_file(path, start=start, end=end))
        except _read_errors(file) as error:
            raise UserError(f"{file}: cannot be read: {one_line(error)}.") from error
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    """The message of an error of a library, to stand in one of ours."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _find_files(entry: str, where: str) -> list[str]:
    """The files that a path, a glob or a URL names, in order.

    Raises:
        UserError: there are none, or where they should be cannot be looked at.
    """
    try:
        files = _look_up(entry if _is_remote(entry) else os.path.expanduser(entry))
    except ImportError as error:  # its message names the package
        raise UserError(f"{where}: a package is missing: {one_line(error)}.") from error
    except _read_errors(entry) as error:
        raise UserError(f"{where}: cannot be looked up: {one_line(error)}.") from error
    if isinstance(files, str):
        raise UserError(f"{where}: {files}.")
    return files


def _look_up(entry: str) -> list[str] | str:
    """The files, or why there are none."""
    file_system, path = _file_system(entry)
    if file_system.isfile(path):  # whatever its name looks like
        return [entry]
    if file_system.isdir(path):
        return f"is a folder; name its files, as in {entry.rstrip('/')}/*.jsonl"
    if not _is_glob(entry):
        return "there is no such file"
    return sorted(_matches(entry)) or "the pattern matches no file"


def _matches(pattern: str) -> list[str]:
    if not _is_remote(pattern):  # as a shell does it: hidden files are left out
        return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    file_system, path = _file_system(pattern)
    matches = file_system.glob(path, detail=True)
    return [
        file_system.unstrip_protocol(p) for p, info in matches.items() if info["type"] == "file"
    ]


def _is_glob(entry: str) -> bool:
    if entry.startswith(("http://", "https://")):  # in which `?` begins a query
        return "*" in entry
    return glob.has_magic(entry)


def _is_remote(file: str) -> bool:
    return "://" in file


def _file_system(file: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the file's path in it."""
    if _is_remote(file):
        return url_to_fs(file)
    return fsspec.filesystem("file"), file


def _read_errors(file: str) -> tuple[type[Exception], ...]:
    """What a file that cannot be read raises; remote file systems have classes of their own."""
    return (Exception,) if _is_remote(file) else UNREADABLE


def _sampled_blocks(size: int, count: int, share: int) -> Iterator[tuple[int, int]]:
    """Begin and end of up to `count` blocks of a file, of `share` bytes together at the most: all
    of it, or spread evenly over it."""
    count = max(1, min(count, share // _BLOCK_BYTES))
    length = min(_BLOCK_BYTES, share)
    for block in range(count):
        start = max(block * length, block * size // count)
        if start < size:
            yield start, min(size, start + length)
