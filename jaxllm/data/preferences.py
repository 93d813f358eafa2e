"""Preferences: records of a prompt and several responses, better and worse, read as such."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.conversations import (
    checked_messages,
    cleaned_message,
    instruction,
    json_line,
    listed_messages,
    question_group,
    read_tools,
    text_field,
)
from jaxllm.data.documents import Passage
from jaxllm.data.records import Record

PREFERENCES_VERSION = 3
"""Changes when the same record may become other tokens."""

_FORMS = "`chosen` and `rejected`, or `responses` (best first)"


@dataclasses.dataclass(frozen=True)
class PreferenceReader:
    """Reads a record as a prompt and responses to it; see `documents.Reader`."""

    joint: str = ""
    """What stands between an instruction and its input."""
    unpaired: bool = False
    """Whether each response stands alone, and is good, with the score 1, or bad, with 0: as the
    record's `label` says of one response; of several the best is good."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `documents.Reader`."""
        return (f"preferences {PREFERENCES_VERSION}", self.joint, str(self.unpaired))

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """One passage of JSON: `{"messages": …, "responses": …, "scores": …, "source": …}`; of
        unpaired responses one of each.

        What is asked are the messages, with `tools` if there are any; the better a response, the
        higher its score. Records that ask the same first belong together.

        Raises:
            ValueError: the record holds no preference; the message says why.
        """
        del marked
        asked = read_asked_and_answered(record.fields, self.joint, clean, self.unpaired)
        _check_different(asked.responses)
        scores = _scores(record.fields, len(asked.responses))
        rated = list(zip(asked.responses.values(), scores, strict=True))
        rankings = [rated]
        if self.unpaired:
            best = max(scores) if len(scores) > 1 else 1.0
            rankings = [[(text, float(score == best))] for text, score in rated]
        source = record.fields.get("source")
        source = source if isinstance(source, str) else PurePath(record.file).name
        tools = {"tools": asked.tools} if asked.tools else {}
        group = record.group or question_group(asked.messages)
        passages = []
        for ranking in rankings:
            preference = {
                "messages": asked.messages,
                "responses": [text for text, _ in ranking],
                "scores": [score for _, score in ranking],
            } | tools
            text = json_line(preference | {"source": source})
            passages.append(Passage(text, group, alike=json_line(preference)))
        return passages


class Asked(NamedTuple):
    """What a record asks, and the responses that it holds."""

    messages: list[dict[str, Any]]
    responses: dict[str, str]
    """By their names in the record, best first."""
    tools: list[Any]


def read_asked_and_answered(
    fields: Mapping[str, Any], joint: str, clean: Cleaner, single: bool
) -> Asked:
    """The prompt and the responses of a record, cleaned.

    Args:
        fields: of the record.
        joint: what stands between an instruction and its input.
        clean: of each text.
        single: whether it may hold one response alone, as `response` or `completion`.

    Raises:
        ValueError: it holds none, an empty one, or no prompt; the message says why.
    """
    named = {name: clean(text) or "" for name, text in read_responses(fields, single).items()}
    for name, text in named.items():
        if not text:
            raise ValueError(f"`{name}` is empty")
    asked = [cleaned_message(message, clean) for message in read_asked(fields, joint)]
    checked_messages([*asked, {"role": "assistant", "content": next(iter(named.values()))}])
    return Asked(asked, named, read_tools(fields.get("tools")))


def read_responses(fields: Mapping[str, Any], single: bool) -> dict[str, str]:
    """The responses that a record holds, by their names in it, best first.

    Args:
        fields: of the record.
        single: whether it may hold one alone, as `response` or `completion`.

    Raises:
        ValueError: it holds none; the message says why.
    """
    if "chosen" in fields and "rejected" in fields:
        return {name: _response(fields, name) for name in ("chosen", "rejected")}
    if "responses" in fields:
        responses = fields["responses"]
        if not isinstance(responses, list | tuple):
            raise ValueError("`responses` is no list")
        if not responses or (len(responses) < 2 and not single):
            raise ValueError(f"`responses` holds {len(responses)}; a ranking has at least two")
        by_name = {f"responses[{place}]": each for place, each in enumerate(responses)}
        return {name: _response(by_name, name) for name in by_name}
    for name in ("response", "completion") if single else ():
        if name in fields:
            return {name: _response(fields, name)}
    raise ValueError(f"no {_FORMS}{', or `response`' if single else ''}{_had(fields)}")


def _had(fields: Mapping[str, Any]) -> str:
    return f" (it has {', '.join(map(str, fields)) or 'no field'})"


def _response(fields: Mapping[str, Any], name: str) -> str:
    """The text of a response, or of the assistant's message that it is written as."""
    value = fields[name]
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, list | tuple):
        if len(messages) != 1:
            raise ValueError(
                f"`{name}` holds {len(messages)} messages; leave it one, the assistant's, and put "
                "those before it into `messages`"
            )
        message = listed_messages(list(messages))[0]
        if message["role"] != "assistant":
            raise ValueError(f"`{name}` is said by {message['role']}, and not by the assistant")
        if more := [key for key in message if key not in ("role", "content")]:
            raise ValueError(f"`{name}` has more than a text: {', '.join(map(str, more))}")
        return message["content"]
    return text_field(fields, name)


def read_asked(fields: Mapping[str, Any], joint: str) -> list[dict[str, Any]]:
    """The messages that a record's responses follow, of which the last is not the assistant's.

    Raises:
        ValueError: there are none; the message says why.
    """
    asked = fields["messages"] if "messages" in fields else fields.get("prompt")
    if "messages" in fields or isinstance(asked, list | tuple):
        messages = listed_messages(list(asked) if isinstance(asked, tuple) else asked)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an answer, and not with the user")
        return messages
    if "instruction" in fields:
        text = instruction(fields, joint)
    elif "prompt" in fields or "question" in fields:
        text = text_field(fields, "prompt" if "prompt" in fields else "question")
    else:
        raise ValueError(f"no `prompt`, `question`, `messages`, or `instruction`{_had(fields)}")
    return [{"role": "user", "content": text}]


def _scores(fields: Mapping[str, Any], count: int) -> list[float]:
    """How good each response is: as the record says, else by their order."""
    if count == 1:
        if "label" not in fields:
            raise ValueError(f"no `label`, that says if the one response is good{_had(fields)}")
        label = fields["label"]
        if label not in (0, 1):  # True and False are
            raise ValueError(f"the label {str(label)[:80]!r} is neither true nor false")
        return [float(label)]
    if fields.get("scores") is not None:
        scores = fields["scores"]
        if not isinstance(scores, list | tuple) or len(scores) != count:
            raise ValueError(f"`scores` is no list of {count}, one for each response")
        found = [_number(score, f"scores[{place}]") for place, score in enumerate(scores)]
        if len(set(map(np.float32, found))) == 1:  # as stores hold them
            raise ValueError("`scores` are all the same: no response is preferred")
        return found
    if count == 2 and fields.get("margin") is not None:
        margin = _number(fields["margin"], "margin")
        if np.float32(margin) <= 0:
            raise ValueError(f"`margin` is {margin:g}; that of a better response is positive")
        return [margin, 0.0]
    return [float(count - 1 - place) for place in range(count)]


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < 1e30:  # as float32 holds it
        raise ValueError(f"`{name}` is no number")
    return number


def _check_different(named: Mapping[str, str]) -> None:
    by_text: dict[str, str] = {}
    for name, text in named.items():
        if text in by_text:
            raise ValueError(f"`{by_text[text]}` and `{name}` are the same")
        by_text[text] = name
