"""Preferences: records of a prompt and several responses, better and worse, as token ids.

A ranking becomes one document with a part for each response, none of which sees the others:

    prompt  response 1  |  prompt  response 2  |  …  |  closing

The tokens of responses, with what ends them, are those that are learnt. The closing token has no
place in a row, so that the end of the last response has one (`packing.PlannedRows`).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.conversations import (
    checked_messages,
    cleaned_message,
    instruction,
    json_line,
    listed_messages,
    question_group,
    text_field,
)
from jaxllm.data.documents import Passage
from jaxllm.data.records import Record
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.store import Encoded, Part
from jaxllm.tokenizers.builtin_templates import BUILTIN_TEMPLATES
from jaxllm.tokenizers.chat_template import ChatTemplate, Message
from jaxllm.tokenizers.tokenizer import Tokenizer

PREFERENCES_VERSION = 1
"""Changes when the same record may become other tokens."""

_FORMS = "`chosen` and `rejected`, or `responses` (best first)"


@dataclasses.dataclass(frozen=True)
class PreferenceReader:
    """Reads a record as a prompt and responses to it; see `documents.Reader`."""

    joint: str = ""
    """What stands between an instruction and its input."""
    unpaired: bool = False
    """Whether a record may hold one response alone, with a `label` that says if it is good."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `documents.Reader`."""
        return (f"preferences {PREFERENCES_VERSION}", self.joint, str(self.unpaired))

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """One passage of JSON: `{"messages": …, "responses": …, "scores": …, "source": …}`.

        What is asked are the messages; the better a response, the higher its score. Records that
        ask the same first belong together.

        Raises:
            ValueError: the record holds no preference; the message says why.
        """
        del marked
        fields = record.fields
        named = read_responses(fields, self.unpaired)
        scores = _scores(fields, len(named))
        cleaned = {name: clean(text) or "" for name, text in named.items()}
        for name, text in cleaned.items():
            if not text:
                raise ValueError(f"`{name}` is empty")
        _check_different(cleaned)
        asked = [cleaned_message(message, clean) for message in read_asked(fields, self.joint)]
        answer = {"role": "assistant", "content": next(iter(cleaned.values()))}
        checked_messages([*asked, answer])
        if asked[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an answer, and not with the user")
        source = fields.get("source")
        preference = {
            "messages": asked,
            "responses": list(cleaned.values()),
            "scores": scores,
            "source": source if isinstance(source, str) else PurePath(record.file).name,
        }
        return [Passage(json_line(preference), record.group or question_group(asked))]


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
        if len(responses) < 2 and not single:
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
        return message["content"]
    return text_field(fields, name)


def read_asked(fields: Mapping[str, Any], joint: str) -> list[dict[str, Any]]:
    """The messages that a record's responses follow.

    Raises:
        ValueError: there are none; the message says why.
    """
    if "messages" in fields:
        return listed_messages(fields["messages"])
    if isinstance(fields.get("prompt"), list | tuple):
        return listed_messages(list(fields["prompt"]))
    if "instruction" in fields:
        text = instruction(fields, joint)
    elif "prompt" in fields:
        text = text_field(fields, "prompt")
    else:
        raise ValueError(f"no `prompt`, `messages`, or `instruction`{_had(fields)}")
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
        if len(set(found)) == 1:
            raise ValueError("`scores` are all the same: no response is preferred")
        return found
    if count == 2 and fields.get("margin") is not None:
        margin = _number(fields["margin"], "margin")
        if margin <= 0:
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


def joint_of(template: ChatTemplate) -> str:
    """What stands between an instruction and its input in the layout that a template writes."""
    return "" if template.source == BUILTIN_TEMPLATES["bos_separated"][0] else "\n"


@dataclasses.dataclass(frozen=True)
class PreferenceKind:
    """Preferences, laid out by the template that the model speaks by (`corpus.DocumentKind`)."""

    template: ChatTemplate
    unpaired: bool = False
    """See `PreferenceReader`."""

    @property
    def reader(self) -> PreferenceReader:
        """What a record is read as."""
        return PreferenceReader(joint_of(self.template), self.unpaired)

    def encoder(self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments) -> "Preferences":
        """What makes tokens of rankings for rows of `seq_len` places."""
        del split
        return Preferences(dataclasses.replace(self.template, tokenizer=tokenizer), seq_len)


class ResponseIds(NamedTuple):
    """A prompt and a response to it as token ids."""

    prompt: Sequence[int]
    response: Sequence[int]
    """With what ends it."""


def response_ids(
    template: ChatTemplate, messages: Sequence[Message], responses: Sequence[str]
) -> list[ResponseIds]:
    """Each response behind the messages, as `template` lays them out.

    Raises:
        UserError: the template cannot render them.
    """
    found = []
    for response in responses:
        answer = {"role": "assistant", "content": response}
        ids, trained = template.encode_trained([*messages, answer])
        end = len(trained) - trained[::-1].index(True)  # what follows the turn's end is not read
        begin = end - [*trained[:end][::-1], False].index(False)
        found.append(ResponseIds(ids[:begin], ids[begin:end]))
    return found


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Makes tokens of what `PreferenceReader` reads (`store.Encoder`)."""

    template: ChatTemplate
    """By which prompt and response are laid out: the one that the policy answers by."""
    max_length: int
    """Tokens of all responses to a prompt at most, each with the prompt before it: the places of
    a row. What is longer loses the beginning of the prompt; where responses alone are too long,
    their ends."""

    gives_parts = True

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what tokens it gives."""
        tokenizer = self.template.tokenizer.fingerprint
        parts = (PREFERENCES_VERSION, self.template.source, self.max_length, tokenizer)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @property
    def ids_below(self) -> int:
        """See `store.Encoder`."""
        return self.template.tokenizer.vocab_size

    def __call__(self, texts: Sequence[str], workers: int = 0) -> list[Encoded | None]:
        """Tokens of each ranking; None where responses become the same when they are cut.

        Raises:
            UserError: the template cannot render one.
        """
        del workers  # a ranking's texts are few
        return [self._encoded(json.loads(text)) for text in texts]

    def _encoded(self, ranking: Mapping[str, Any]) -> Encoded | None:
        found = response_ids(self.template, ranking["messages"], ranking["responses"])
        fitted = fitted_responses(found, self.max_length)
        if len({tuple(each.response) for each in fitted}) < len(fitted):
            return None
        ids: list[int] = []
        trained: list[bool] = []
        for each in fitted:
            ids += [*each.prompt, *each.response]
            trained += [False] * len(each.prompt) + [True] * len(each.response)
        sizes = (len(each.prompt) + len(each.response) for each in fitted)
        parts = [Part(size, score) for size, score in zip(sizes, ranking["scores"], strict=True)]
        closing = self.template.tokenizer.eos_id
        return Encoded([*ids, closing], [*trained, False], fitted != found, parts)


def fitted_responses(found: Sequence[ResponseIds], places: int) -> list[ResponseIds]:
    """Responses to a prompt, cut so that together they take so many places at most.

    The prompt loses its beginning, in front of each response alike. If then less than its last
    token would be left, responses lose their ends, and the prompt keeps that token.
    """
    if sum(len(each.prompt) + len(each.response) for each in found) <= places:
        return list(found)
    room = (places - sum(len(each.response) for each in found)) // len(found)
    longest = max(places // len(found) - 1, 1)
    responses = [each.response if room >= 1 else each.response[:longest] for each in found]
    return [
        ResponseIds(each.prompt[-max(room, 1) :], response)
        for each, response in zip(found, responses, strict=True)
    ]
