"""Built-in sources: records that every machine with Python can make, so nothing is downloaded.

An entry is `builtin:NAME[:SIZE[:SEED]]`, such as `builtin:pydocs`, `builtin:sorting:10k`,
`builtin:sorting:10k-12k` or `builtin:countdown:2k:7`; docs/builtin.md describes each.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.data import pydocs, pydocs_records
from jaxllm.data.permutation import Permutation
from jaxllm.data.records import Record, Source
from jaxllm.data.tasks import TASKS, TASKS_VERSION, Task
from jaxllm.errors import UserError

BUILTIN_PREFIX = "builtin:"

PYDOCS: dict[str, Callable[[], tuple[pydocs.Item, ...]]] = {
    "pydocs": pydocs.documents,
    "pydocs_instruct": pydocs_records.instructions,
    "pydocs_preference": pydocs_records.preferences,
    "pydocs_classify": pydocs_records.classifications,
}
"""What is made of the Python documentation, by name."""

_TASK_SIZE = 10_000  # of a task whose entry names none
_NUMBER = r"([0-9]{1,18})([km]?)"
_SIZE = re.compile(rf"(?:{_NUMBER}-)?{_NUMBER}")
_SEED = re.compile(r"[0-9]{1,18}")
_UNITS = {"": 1, "k": 1000, "m": 1_000_000}


def builtin_source(entry: str, field: str) -> Source:
    """The source of `builtin:NAME[:SIZE[:SEED]]`.

    Args:
        entry: SIZE is a number of records, `k` meaning thousands and `m` millions: 10,000 of a
            task unless given, and all of what is made of the Python documentation. Or it is a
            range `BEGIN-END`: of the first END records those after the first BEGIN. SEED, 0
            unless given, chooses the order.
        field: the configuration field it comes from, for messages.

    Raises:
        UserError: no built-in source has that name (the known ones are listed), SIZE is no
            number or range, SEED is no number, or there are fewer records than SIZE.
    """
    where = f"config.{field}: {entry}"
    name, *options = entry.removeprefix(BUILTIN_PREFIX).split(":")
    if name not in TASKS and name not in PYDOCS:
        raise UserError(f"{where}: there is no such source; {_known(name)}")
    if len(options) > 2:
        raise UserError(f"{where}: write it as {BUILTIN_PREFIX}{name}:SIZE:SEED.")
    part = _part(options[0], where) if options else None
    seed = _seed(options[1], where) if len(options) > 1 else 0
    if part is not None:
        count = TASKS[name].count if name in TASKS else len(PYDOCS[name]())
        if part.stop > count:
            raise UserError(f"{where}: there are only {count:,} records of it; ask for no more.")
    if name in TASKS:
        return TaskSource(entry, TASKS[name], part or range(_TASK_SIZE), seed)
    return PydocsSource(entry, name, part, seed)


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Generated problems with known answers."""

    name: str
    task: Task
    part: range
    """Which of the task's records, counted from 0 in the order of the seed."""
    seed: int
    marked: bool = False

    def fingerprint(self) -> str:
        """Hash of what is asked for and the generator's version."""
        return _hash(self.task.name, str(self.part), self.seed, TASKS_VERSION)

    def records(self) -> Iterator[Record]:
        """Generated as they are asked for; each stands alone."""
        for number, fields in enumerate(self.task.records(self.part, self.seed), start=1):
            yield Record(fields, self.name, number)


@dataclasses.dataclass(frozen=True)
class PydocsSource:
    """Records from the documentation and sources of the Python that runs."""

    name: str
    kind: str
    """A name of `PYDOCS`."""
    part: range | None
    """Which of its records, counted from 0 in the order of the seed; None: all of them."""
    seed: int
    marked: bool = False

    def fingerprint(self) -> str:
        """Hash of the files that are read, and of what is asked for."""
        return _hash(self.kind, str(self.part), self.seed, pydocs.fingerprint())

    def records(self) -> Iterator[Record]:
        """All, or a random choice of them, in the order in which they stand."""
        items = PYDOCS[self.kind]()
        order = Permutation(len(items), f"{self.kind} {self.seed}")
        chosen = range(len(items)) if self.part is None else sorted(map(order, self.part))
        for number, index in enumerate(chosen, start=1):
            group, fields = items[index]
            yield Record(fields, self.name, number, group)


def _known(name: str) -> str:
    """The names there are, and the one that was probably meant."""
    names = [*PYDOCS, *TASKS]
    listed = f"known are {', '.join(BUILTIN_PREFIX + known for known in names)}."
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"{listed} Did you mean {BUILTIN_PREFIX}{nearest[0]}?" if nearest else listed


def _part(text: str, where: str) -> range:
    """The records that `SIZE` or `BEGIN-END` means."""
    if match := _SIZE.fullmatch(text):
        begin, begin_unit, end, end_unit = match.groups(default="")
        part = range(int(begin or 0) * _UNITS[begin_unit], int(end) * _UNITS[end_unit])
        if part:
            return part
    raise UserError(
        f"{where}: the size {text!r} must be a whole number from 1, as 500 or 10k, or a range "
        "whose end is larger than its beginning, as 10k-12k."
    )


def _seed(text: str, where: str) -> int:
    if not _SEED.fullmatch(text):
        raise UserError(f"{where}: the seed {text!r} must be a whole number from 0, as in 10k:7.")
    return int(text)


def _hash(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
