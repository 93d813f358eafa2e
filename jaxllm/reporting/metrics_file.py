"""`metrics.jsonl`: one JSON object a line for each log point.

    {"step": 120, "time": 14.2, "train/loss": 3.21, "train/learning_rate": 0.0009}

`step` counts optimizer updates, `time` is seconds since the run began, every other name holds a
float. A value that is not finite is written as `null`, because JSON has no NaN, and read back as
NaN: a reader that knows only JSON can read every line. A line counts when its newline is there.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from absl import logging

from jaxllm.files import write_atomically
from jaxllm.reporting.quantities import Number


class MetricsFile:
    """Appends to a `metrics.jsonl`, whatever state an earlier run left it in.

    Args:
        path: the file, made with the first line; its folder must exist.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._unwritten = b""
        self._warned = False

    def append(self, step: int, seconds: Number, scalars: Mapping[str, Number]) -> None:
        """Writes one line; the file is opened and closed each time, so the line is on its way.

        A line that cannot be written (the disk is full) waits for the next one, or for `flush`,
        with a warning, given once: training is worth more than its log.
        """
        record: dict[str, Number] = {"step": int(step), "time": round(float(seconds), 3)}
        record |= {name: float(value) for name, value in scalars.items()}
        self._unwritten += f"{json.dumps(_json_safe(record), ensure_ascii=False)}\n".encode()
        self.flush()

    def flush(self) -> None:
        """Writes the lines that wait."""
        if not self._unwritten:
            return
        whole = None
        try:
            with open(self._path, "ab+") as file:
                _drop_half_line(file)
                whole = file.seek(0, os.SEEK_END)
                file.write(self._unwritten)
            self._unwritten, self._warned = b"", False
        except OSError as error:
            if whole is not None:  # some of the lines may have found room
                with contextlib.suppress(OSError):
                    os.truncate(self._path, whole)
            if not self._warned:
                logging.warning("%s: metrics cannot be written: %s", self._path, error.strerror)
            self._warned = True

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps after `step`, and broken ones, in one atomic change.

        To be called when training resumes from `step`, so that no step is logged twice.
        """
        if not self._path.exists():
            return
        before = self._path.read_bytes()
        kept = b"".join(
            line
            for line in before.splitlines(keepends=True)
            if (record := _parsed(line)) is not None and record["step"] <= step
        )
        if kept != before:
            write_atomically(self._path, kept.decode())


def read_metrics(path: str | os.PathLike) -> list[dict[str, Number]]:
    """Every whole line in order, broken ones passed over; an empty list if there is no file.

    `step` is an int; a `null` becomes NaN.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Number] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {name: math.nan if value is None else value for name, value in record.items()}


def _json_safe(record: Mapping[str, Number]) -> dict[str, Number | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _drop_half_line(file: BinaryIO) -> None:
    """Cuts what follows the last newline: what a kill or a full disk left of a line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
