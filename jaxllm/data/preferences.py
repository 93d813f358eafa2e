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

import numpy as np

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.config import DataConfig
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
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.store import Encoded, Part
from jaxllm.tokenizers.builtin_templates import BUILTIN_TEMPLATES
from jaxllm.tokenizers.chat_template import ChatTemplate, Message, chat_template
from jaxllm.tokenizers.tokenizer import Tokenizer

PREFERENCES_VERSION = 1
"""Changes when the same record may become other tokens."""

_SHORTEST_ROW = 8  # two of a prompt's last token, a token of the response, and what ends it
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

        What is asked are the messages, with `tools` if there are any; the better a response, the
        higher its score. Records that ask the same first belong together.

        Raises:
            ValueError: the record holds no preference; the message says why.
        """
        del marked
        asked = read_asked_and_answered(record.fields, self.joint, clean, self.unpaired)
        _check_different(asked.responses)
        source = record.fields.get("source")
        preference = {
            "messages": asked.messages,
            "responses": list(asked.responses.values()),
            "scores": _scores(record.fields, len(asked.responses)),
            "source": source if isinstance(source, str) else PurePath(record.file).name,
        } | ({"tools": asked.tools} if asked.tools else {})
        group = record.group or question_group(asked.messages)
        return [Passage(json_line(preference), group)]


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
    if asked[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an answer, and not with the user")
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


def check_preference_data(data: DataConfig) -> None:
    """Checks that rankings can lie in rows as the data is packed.

    Raises:
        ValueError: they cannot.
    """
    if data.packing == "concat":
        raise ValueError(
            "data.packing: concat would cut rankings; take best_fit, or none to give each a row of "
            "its own"
        )
    if not data.document_mask:
        raise ValueError("data.document_mask: responses must not see each other; leave it True")
    if data.seq_len < _SHORTEST_ROW:
        raise ValueError(f"data.seq_len: {_SHORTEST_ROW} is the least that holds two responses")


def layout_of(tokenizer: Tokenizer, named: str, field: str) -> ChatTemplate:
    """The template by which prompts and responses are laid out.

    Raises:
        UserError: as `chat_template`.
    """
    own = "" if tokenizer.chat_template else "bos_separated"
    return chat_template(tokenizer, named or own, field)


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
    template: ChatTemplate,
    messages: Sequence[Message],
    responses: Sequence[str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[ResponseIds]:
    """Each response behind the messages, as `template` lays them out.

    Raises:
        UserError: the template cannot render them.
        ValueError: it writes nothing of a response.
    """
    before = 0
    if any(message["role"] == "assistant" for message in messages):
        before = len(template.encode_trained(messages, tools).answers)
    found = []
    for response in responses:
        answer = {"role": "assistant", "content": response}
        ids, _, answers = template.encode_trained([*messages, answer], tools)
        begin, end = answers[-1] if len(answers) > before else (0, 0)
        if begin == end:
            raise ValueError("the template writes nothing of a response")
        found.append(ResponseIds(ids[:begin], ids[begin:end]))  # what follows it is not read
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
        fitted = self.fitted(ranking)
        if fitted is None:
            return None
        ids: list[int] = []
        trained: list[bool] = []
        for each in fitted.responses:
            ids += [*each.prompt, *each.response]
            trained += [False] * len(each.prompt) + [True] * len(each.response)
        sizes = (len(each.prompt) + len(each.response) for each in fitted.responses)
        parts = [Part(size, score) for size, score in zip(sizes, ranking["scores"], strict=True)]
        closing = self.template.tokenizer.eos_id
        return Encoded([*ids, closing], [*trained, False], fitted.cut, parts)

    def fitted(self, ranking: Mapping[str, Any]) -> "Fitted | None":
        """The responses of a ranking as they lie in a row; None where that cannot be.

        Raises:
            UserError: the template cannot render them.
        """
        try:
            found = response_ids(
                self.template, ranking["messages"], ranking["responses"], ranking.get("tools")
            )
        except ValueError:
            return None
        fitted = fitted_responses(found, self.max_length)
        size = sum(len(each.prompt) + len(each.response) for each in fitted)
        same = len({tuple(each.response) for each in fitted}) < len(fitted)
        return None if same or size > self.max_length else Fitted(fitted, fitted != found)


class Fitted(NamedTuple):
    """The responses of a ranking as they lie in a row."""

    responses: list[ResponseIds]
    cut: bool
    """Whether they are not whole."""


def fitted_responses(found: Sequence[ResponseIds], places: int) -> list[ResponseIds]:
    """Responses to a prompt, cut so that together they take so many places at most, if that many
    hold them at all.

    The prompt loses its beginning, in front of each response alike. If not even its last token
    would be left, that one is kept, and the longest responses lose their ends.
    """
    if sum(len(each.prompt) + len(each.response) for each in found) <= places:
        return list(found)
    answers = [len(each.response) for each in found]
    room = (places - sum(answers)) // len(found)
    if room < 1:
        answers, room = _levelled(answers, places - len(found)), 1
    return [
        ResponseIds(each.prompt[-room:], each.response[:length])
        for each, length in zip(found, answers, strict=True)
    ]


def _levelled(lengths: Sequence[int], total: int) -> list[int]:
    """The lengths, the largest of them lowered alike until they come to `total`; each is at least
    1."""
    left, level = total, 0
    for rank, length in enumerate(sorted(lengths)):
        level = max(left // (len(lengths) - rank), 1)
        if length > level:
            break
        left -= length
    return [min(length, level) for length in lengths]
