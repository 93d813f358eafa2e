"""Checksums of a checkpoint's files, which tell one that was damaged since it was written.

Orbax and TensorStore find a file that is missing or cut short, but most of the bytes that hold
numbers can be changed without their seeing it.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxllm.files import write_json

_PIECE = 16 * 2**20


def write_checksums(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Writes `checksums.PART.json` into a checkpoint: size and CRC-32 of each of its files, or of
    those of one of several parts, each of which is for another process to write.

    Raises:
        OSError: a file cannot be read, or there is no room.
    """
    files = {
        name: _checksum(checkpoint / name)
        for name in _names(checkpoint)
        if _part_of(name, parts) == part
    }
    write_json(checkpoint / f"checksums.{part}.json", files)


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the first file of a checkpoint, or of a part of it, that is not as it was
    written; empty if all are, or nothing was recorded of them.

    Raises:
        OSError: a file that is there cannot be read.
    """
    for record in sorted(checkpoint.glob("checksums.*.json")):
        try:
            files = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            return f"{record.name} cannot be read"
        for name, recorded in files.items():
            if _part_of(name, parts) != part:
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


def _part_of(name: str, parts: int) -> int:
    return zlib.crc32(name.encode()) % parts


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]
