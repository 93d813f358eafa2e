"""Tasks that a configuration names: `SOURCE` or `NAME=SOURCE`, read into items."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

from jaxllm.data.documents import RejectedLines
from jaxllm.data.records import BadLine, Source
from jaxllm.data.sources import FileSource, make_source
from jaxllm.errors import UserError
from jaxllm.evaluation.items import Item, Kind, Layout, kind_of, known_fields

T = TypeVar("T")

_NAMED = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_.-]*)=(?P<source>.+)")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\-\u0080-\U0010ffff]+")


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind, from one source."""

    name: str
    """Its part of the names of scores."""
    source: str
    kind: Kind
    items: tuple[Item, ...]
    named: bool = False
    """Whether the configuration gave the name."""


def read_tasks(
    spec: str, field: str, layout: Layout, max_bad_fraction: float, rejected: RejectedLines
) -> list[Task]:
    """The tasks of a comma string of `SOURCE` or `NAME=SOURCE`.

    A pattern that several files match is a task for each, unless it is given a name. A task is
    called by the stem of its file, or by the name of a built-in source or data set.

    Args:
        spec: the comma string.
        field: the configuration field it comes from, for messages.
        layout: how questions are put.
        max_bad_fraction: share of the lines of a source that may be bad.
        rejected: where bad lines go.

    Raises:
        UserError: a source is wrong, its records are of no known kind, it has no items, or too
            many lines are bad; or two tasks have one name.
    """
    tasks: list[Task] = []
    for entry in filter(None, map(str.strip, spec.split(","))):
        named = _NAMED.fullmatch(entry) is not None
        for name, source in _named_sources(entry, field):
            task = _read(name, source, field, layout, max_bad_fraction, rejected)
            tasks.append(dataclasses.replace(task, named=named))
    names = [task.name for task in tasks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"config.{field}: two tasks are called {repeated[0]}; write NAME= before one of them, "
            f"as in {repeated[0]}_2={tasks[-1].source}."
        )
    return tasks


def spread(items: Sequence[T], count: int) -> tuple[T, ...]:
    """`count` of the items, evenly from all of them (files are often sorted); 0: all."""
    if not count or count >= len(items):
        return tuple(items)
    return tuple(items[number * len(items) // count] for number in range(count))


def _named_sources(entry: str, field: str) -> list[tuple[str, Source]]:
    match = _NAMED.fullmatch(entry)
    name, place = (match["name"], match["source"]) if match else ("", entry)
    source = make_source(place, field, parse_special_tokens=False)
    if name or not isinstance(source, FileSource):
        return [(name or _name(place), source)]
    files = [(file, dataclasses.replace(source, name=file, files=(file,))) for file in source.files]
    return [(_name(file), single) for file, single in files]


def _name(place: str) -> str:
    """`arithmetic` of `builtin:arithmetic:1k`, `arc` of `data/arc.jsonl.gz`."""
    _, colon, rest = place.partition(":")
    if colon and not rest.startswith("//"):
        stem = rest.split(":")[0]
    else:
        stem = PurePosixPath(place).name.split(".")[0]
    return _NOT_IN_NAMES.sub("_", stem) or "task"


def _read(
    name: str,
    source: Source,
    field: str,
    layout: Layout,
    max_bad_fraction: float,
    rejected: RejectedLines,
) -> Task:
    items: list[Item] = []
    kind: Kind | None = None
    lines, bad = 0, []
    for record in source.records():
        lines += 1
        if isinstance(record, BadLine):
            bad.append(record)
            continue
        kind = kind or kind_of(record.fields)
        if kind is None:
            raise UserError(
                f"config.{field}: {record.file}:{record.line}: is of no known kind (it has the "
                f"fields {', '.join(map(str, record.fields)) or 'none'}); a record of a task has "
                f"{known_fields()}."
            )
        try:
            if missing := [name for name in kind.fields if name not in record.fields]:
                raise ValueError(f"no field `{missing[0]}`")
            item = kind.parse(record.fields, layout)
            items.append(
                dataclasses.replace(item, subject=_subject(record.fields), line=record.line)
            )
        except ValueError as error:
            bad.append(BadLine(record.file, record.line, str(error)))
    for line in bad:
        rejected.add(line)
    if bad and (len(bad) > max_bad_fraction * lines or not items):
        raise UserError(
            f"{source.name}: {len(bad)} of the {lines} lines read are bad, more than "
            f"config.data.max_bad_fraction={max_bad_fraction:g} allows; the first is "
            f"{bad[0].file}:{bad[0].line} ({bad[0].reason})."
        )
    if kind is None:
        raise UserError(f"config.{field}: there are no records in {source.name}.")
    return Task(name, source.name, kind, tuple(items))


def _subject(fields: Mapping[str, Any]) -> str:
    subject = fields.get("subject")
    return subject if isinstance(subject, str) else ""
