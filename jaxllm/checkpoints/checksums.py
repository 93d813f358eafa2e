"""Checksums of a checkpoint's files, which tell one that was damaged since it was written.

Orbax and TensorStore find a file that is missing or cut short, but most of the bytes that hold
numbers can be changed without their seeing it.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxllm.files import write_json

_RECORD = "checksums.json"
_PIECE = 16 * 2**20
_FILES_AT_ONCE = 8


def write_checksums(checkpoint: Path) -> None:
    """Writes `checksums.json` into a checkpoint: size and CRC-32 of each of its files.

    Raises:
        OSError: a file cannot be read, or there is no room.
    """
    names = list(_names(checkpoint))
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="checksums") as threads:
        sums = threads.map(lambda name: _checksum(checkpoint / name), names)
        write_json(checkpoint / _RECORD, dict(zip(names, sums, strict=True)))


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the first file of a checkpoint, or of a part of it, that is not as it was
    written; empty if all are, or nothing was recorded of them.

    Raises:
        OSError: a file that is there cannot be read.
    """
    record = checkpoint / _RECORD
    if not record.exists():
        return ""
    try:
        files = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return f"{record.name} cannot be read"
    for name, recorded in files.items():
        if zlib.crc32(name.encode()) % parts != part:
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != recorded[0]:
            return f"{name} has {path.stat().st_size:,} bytes, and had {recorded[0]:,}"
        if _checksum(path) != recorded:
            return f"{name} has changed since it was written"
    return ""


def _names(checkpoint: Path) -> Iterator[str]:
    """The files of the checkpoint's items, relative to it."""
    for item in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        for path in sorted(item.rglob("*")):
            if path.is_file():
                yield path.relative_to(checkpoint).as_posix()


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]
