"""Files of what comes in any order, by number: kept at once, and written out in order.

A run that waits for others' answers, each of which costs something, may be killed at any moment. So
an answer is a line of `NumberedLines` as soon as it has come, and `OrderedLines` is what is made of
all of them, in the order of their numbers.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import UserError

_NUMBER = "number"


class NumberedLines:
    """A JSONL file of values by number, each of which is appended as it comes.

    Only where they stand is held in memory.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. A last line that was half written is cut.

        Raises:
            UserError: another line is none of such a file.
        """
        self._path = path
        self._places: dict[int, int] = {}
        self._end = 0
        # Unbuffered: a line is written by one call, and survives the process from then on.
        self._file: IO[bytes] = path.open("ab", buffering=0)
        self._lines: IO[bytes] = path.open("rb")
        for count, line in enumerate(self._lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                number = int(json.loads(line)[_NUMBER])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {count} is damaged ({error}); take it out, and what it held is "
                    "asked for again."
                ) from None
            self._place(number, line)
        os.truncate(path, self._end)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __iter__(self) -> Iterator[int]:
        """The numbers, in order."""
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self._lines.seek(self._places[number])
        return json.loads(self._lines.readline())

    def append(self, number: int, value: Mapping[str, Any]) -> None:
        """Keeps a value, which JSON can write, under a number that has none yet."""
        line = json.dumps({_NUMBER: number, **value}, ensure_ascii=False).encode() + b"\n"
        with _named(self._path):
            written = self._file.write(line)
            if written != len(line):  # so a full disk is told
                self._file.write(line[written:])
        self._place(number, line)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._lines.close()

    def _place(self, number: int, line: bytes) -> None:
        self._places[number] = self._end
        self._end += len(line)


class OrderedLines:
    """A file of the lines that each number makes, in the order of numbers.

    It grows as they come; a number that comes after a later one gets its place at the end, when the
    file is written anew.
    """

    def __init__(
        self, path: Path, known: Iterable[int], lines: Callable[[int], Iterable[str]]
    ) -> None:
        """Writes the lines of what is known already.

        Args:
            path: of the file, which is replaced at once.
            known: the numbers whose lines can be made; they become more.
            lines: makes those of a number, without line ends.
        """
        self._path, self._known, self._lines = path, known, lines
        self._passed: set[int] = set()
        self._write_anew()

    def add(self, numbers: Iterable[int], passed: Iterable[int] = ()) -> None:
        """Takes numbers that are known now, and such as will not be.

        Args:
            numbers: those whose lines can be made now.
            passed: those that others need not wait for any more.
        """
        self._waiting.update(numbers)  # one that comes late waits until the end
        self._passed.update(passed)
        with _named(self._path):
            while self._next in self._waiting or self._next in self._passed:
                if self._next in self._waiting:
                    self._waiting.remove(self._next)
                    self._write(self._file, self._next)
                self._next += 1
            self._file.flush()

    def close(self) -> None:
        """Writes what has not been written in its place, and closes the file."""
        if self._waiting:
            self._file.close()
            self._write_anew()
        self._file.close()

    def _write_anew(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.new")
        self._next, self._waiting = 0, set[int]()
        with _named(temporary), temporary.open("w", encoding="utf-8") as file:
            for number in self._known:
                self._write(file, number)
                self._next = number + 1
        os.replace(temporary, self._path)
        self._file: IO[str] = self._path.open("a", encoding="utf-8")

    def _write(self, file: IO[str], number: int) -> None:
        file.writelines(f"{line}\n" for line in self._lines(number))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, an error of writing, which knows no name, tells the file's."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
