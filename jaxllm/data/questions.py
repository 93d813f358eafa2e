"""Prompts that are asked once each, in order, with where each stands: what a teacher is asked."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data.cleaning import NO_CLEANING, Cleaner
from jaxllm.data.conversations import json_line
from jaxllm.data.documents import Passage, RejectedLines, read_documents
from jaxllm.data.mixture import parse_entries
from jaxllm.data.prompts import Prompt, PromptReader
from jaxllm.data.records import Record
from jaxllm.data.selection import fingerprint_of
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError


class PlacedPrompt(NamedTuple):
    """A prompt, and where its record stands."""

    prompt: Prompt
    """Without token ids: they are the teacher's matter."""
    tools: Sequence[Mapping[str, Any]]
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked of a configuration."""

    prompts: Sequence[PlacedPrompt]
    duplicates: int
    """Prompts that ask what an earlier one does, and are left out."""
    bad_lines: int
    fingerprint: str
    """Changes when others may be asked."""


@dataclasses.dataclass(frozen=True)
class _PlacedReader:
    """Reads as `PromptReader`, and adds where the record stands."""

    reader: PromptReader

    @property
    def names(self) -> tuple[str, ...]:
        return self.reader.names

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        place = {"file": record.file, "line": record.line}
        return [
            passage._replace(text=json_line(json.loads(passage.text) | place))
            for passage in self.reader(record, marked, clean)
        ]


def read_questions(
    spec: str, max_bad_fraction: float, joint: str, rejected: RejectedLines
) -> Questions:
    """The prompts of `data.train`, as they are written: nothing is cleaned.

    Args:
        spec: sources, separated by commas.
        max_bad_fraction: the share of bad lines that a source may have.
        joint: what stands between an instruction and its input.
        rejected: where bad lines go.

    Raises:
        UserError: there are none, a source cannot be read, has a weight or too many bad lines.
    """
    entries = parse_entries(spec, "data.train")
    if weighted := [entry.name for entry in entries if entry.weight is not None]:
        raise UserError(
            f"config.data.train: {weighted[0]} has a weight, and each prompt is asked once; leave "
            "weights out."
        )
    sources = [make_source(entry.name, "data.train", False) for entry in entries]
    reader = _PlacedReader(PromptReader(joint))
    prompts: list[PlacedPrompt] = []
    seen: set[bytes] = set()
    read = 0
    clean = Cleaner(NO_CLEANING)
    for document in read_documents(sources, clean, max_bad_fraction, rejected, reader):
        read += 1
        if document.digest not in seen:
            seen.add(document.digest)
            prompts.append(_placed(json.loads(document.text)))
    if not prompts:
        raise UserError(f"config.data.train: there are no prompts in {spec}.")
    fingerprint = fingerprint_of(*reader.names, *(source.fingerprint() for source in sources))
    return Questions(prompts, read - len(prompts), rejected.bad, fingerprint)


def _placed(asked: Mapping[str, Any]) -> PlacedPrompt:
    prompt = Prompt((), asked["messages"], asked["record"])
    return PlacedPrompt(prompt, asked.get("tools", ()), asked["file"], asked["line"])
