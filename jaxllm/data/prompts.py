"""Prompts to be answered, each with the record that judges its answers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.config import SourcesConfig
from jaxllm.data.conversations import (
    checked_messages,
    cleaned_message,
    json_line,
    question_group,
    read_tools,
)
from jaxllm.data.documents import Passage
from jaxllm.data.mixture import mix, parse_entries
from jaxllm.data.preferences import read_asked
from jaxllm.data.records import Record
from jaxllm.data.rows import Row
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.errors import UserError
from jaxllm.tokenizers.chat_template import ChatTemplate, Message

PROMPTS_VERSION = 1
"""Changes when the same record may become another prompt."""


@dataclasses.dataclass(frozen=True)
class PromptReader:
    """Reads a record as a prompt; see `documents.Reader`."""

    joint: str = ""
    """What stands between an instruction and its input."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `documents.Reader`."""
        return (f"prompts {PROMPTS_VERSION}", self.joint)

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """One passage of JSON: `{"messages": …, "record": …}`, with `tools` if there are any; the
        record is whole. Records that ask the same first belong together, and those that ask the
        same are copies.

        Raises:
            ValueError: the record asks nothing; the message says why.
        """
        del marked
        fields = dict(record.fields)
        messages = [cleaned_message(message, clean) for message in read_asked(fields, self.joint)]
        checked_messages([*messages, {"role": "assistant", "content": "an answer"}])
        tools = read_tools(fields.get("tools"))
        asked = {"messages": messages} | ({"tools": tools} if tools else {})
        text = json_line(asked | {"record": fields})
        group = record.group or question_group(messages)
        return [Passage(text, group, alike=json_line(asked))]


class Prompt(NamedTuple):
    """What is asked, and what its answers are judged by."""

    ids: tuple[int, ...]
    """Up to where the answer begins."""
    messages: Sequence[Message]
    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What was said last."""
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a configuration."""

    train: tuple[Sequence[Prompt], ...]
    """Those of each training source, in order."""
    held_out: Sequence[Prompt]
    dropped: int
    """Those that were longer than allowed, and are left out."""


class DrawnPrompts(Sequence[Prompt]):
    """Training prompts in the order in which they are asked: of several sources by their weights,
    each shuffled anew for every epoch."""

    def __init__(self, prompts: Prompts, data: SourcesConfig, seed: int) -> None:
        """`seed`: of the order."""
        self._sources = prompts.train
        sources = [_Numbers(source, len(own)) for source, own in enumerate(prompts.train)]
        entries = parse_entries(data.train, "data.train")
        self._numbers = mix(sources, entries, seed, data.temperature, data.max_epochs)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self._numbers[index]
        return self._sources[int(found["source"])][int(found["number"])]


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The numbers of a source's prompts, as rows."""

    source: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return {"source": np.array(self.source), "number": np.array(index)}


def read_prompts(split: SplitDocuments, template: ChatTemplate, longest: int) -> Prompts:
    """The prompts of a split whose reader is `PromptReader`, laid out by a template.

    Args:
        split: of documents.
        template: by which the model is spoken to.
        longest: tokens of a prompt at most; a longer one is left out, since what it asks may stand
            anywhere in it.

    Raises:
        UserError: none is left of a source or of those held out, or as `ChatTemplate.encode`.
    """
    sources = len(split.sources)
    train: list[list[Prompt]] = [[] for _ in range(sources - split.held_out_sources)]
    held_out: list[Prompt] = []
    dropped = 0
    for document, side in split.documents():
        asked = json.loads(document.text)
        messages = asked["messages"]
        ids = template.encode(messages, add_generation_prompt=True, tools=asked.get("tools"))
        if not 0 < len(ids) <= longest:
            dropped += 1
            continue
        prompt = Prompt(tuple(ids), messages, asked["record"])
        if side == TRAIN:
            train[document.source - split.held_out_sources].append(prompt)
        elif side == HELD_OUT:
            held_out.append(prompt)
    names = [source.name for source in split.sources[split.held_out_sources :]]
    for name, prompts in (*zip(names, train, strict=True), ("what is held out", held_out)):
        if not prompts:
            raise UserError(
                f"config.data: no prompt of {name} is left: all are longer than "
                f"config.rl.max_prompt={longest} tokens; make it larger."
            )
    return Prompts(tuple(train), held_out, dropped)
