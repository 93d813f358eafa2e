"""Conversations from records: what supervised fine-tuning reads, in whichever form it was written.

A conversation becomes one line of JSON, as a text becomes a document: `{"messages": […]}`, with
`tools` if there are any; and text to pretrain on, mixed in among them, `{"text": …}`.
"""

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Mapping
from typing import Any

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.documents import Passage, text_passages
from jaxllm.data.records import Record

ROLES = ("system", "user", "assistant", "tool", "tool_call")
"""Who speaks in `messages`. What `tool_call` says, a call as JSON, the assistant says."""

CONVERSATIONS_VERSION = 2
"""Changes when the same record may become another conversation."""

_DEEPEST = 100  # lists and objects within each other: what reads them further on is recursive
_FORMS = (
    "`instruction` and `output`, `prompt` and `response`, `question` and `answer`, `messages`, or "
    "`text`"
)
REASONING = ("gsm8k", "think", "leave_out")
"""How an answer is written that has its reasoning before it."""
_FINAL = "####"


@dataclasses.dataclass(frozen=True)
class ConversationReader:
    """Reads a record as a conversation; see `documents.Reader`."""

    joint: str = ""
    """What stands between an instruction and its input."""
    reasoning: str = "gsm8k"
    """Of records of `question` and `answer`, with `reasoning` between them or in the answer, which
    then ends `#### n`: `gsm8k` (the reasoning, and in a line of its own `#### n`), `think`
    (`<think>`, the reasoning, `</think>`, the answer), or `leave_out` (the answer alone). The
    latter two are so of records that have a response as well."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `documents.Reader`."""
        own = () if self.reasoning == "gsm8k" else (self.reasoning,)
        return (f"conversations {CONVERSATIONS_VERSION}", self.joint, *own)

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """The conversation of a record; of a `text`, its documents.

        Conversations that ask the same first belong together: they stay on one side of the
        held-out split.

        Raises:
            ValueError: the record holds no conversation to learn from; the message says why.
        """
        fields = record.fields
        messages = self._messages(fields)
        if messages is None:
            passages = text_passages(record, marked, clean)
            return [Passage(json_line({"text": each.text}), each.group) for each in passages]
        cleaned = checked_messages([cleaned_message(message, clean) for message in messages])
        tools = read_tools(fields.get("tools"))
        conversation = {"messages": cleaned} | ({"tools": tools} if tools else {})
        return [Passage(json_line(conversation), record.group or question_group(cleaned))]

    def _messages(self, fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The messages as they were written; None of a record that holds a text alone."""
        if "question" in fields and self.reasoning != "gsm8k":
            return self._reasoned(fields)
        if "messages" in fields:
            return listed_messages(fields["messages"])
        if "instruction" in fields and "output" in fields:
            return _exchange(instruction(fields, self.joint), text_field(fields, "output"))
        if "prompt" in fields and "response" in fields:
            return _exchange(text_field(fields, "prompt"), text_field(fields, "response"))
        # A question with choices is one of a test.
        if "question" in fields and "answer" in fields and "choices" not in fields:
            return self._reasoned(fields)
        if "text" in fields:
            return None
        raise ValueError(f"no {_FORMS} (it has {', '.join(map(str, fields)) or 'no field'})")

    def _reasoned(self, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A question and its answer, with the reasoning as it is asked for."""
        asked, answer = text_field(fields, "question"), _text_or_number(fields, "answer")
        reasoning = text_field(fields, "reasoning", "").strip()
        before, marked, final = answer.rpartition(_FINAL)
        if marked and not reasoning:
            reasoning, answer = before.strip(), final.strip()
        if not reasoning or self.reasoning == "leave_out":
            return _exchange(asked, answer)
        if self.reasoning == "think":
            return _exchange(asked, f"<think>{reasoning}</think>{answer}")
        return _exchange(asked, f"{reasoning}\n{_FINAL} {answer}")


def _text_or_number(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return str(value)
    return text_field(fields, name)


def instruction(fields: Mapping[str, Any], joint: str) -> str:
    """An instruction with its input, if there is one.

    Raises:
        ValueError: one of them is no text.
    """
    asked = [text_field(fields, "instruction"), text_field(fields, "input", "")]
    return joint.join(filter(None, asked))


def _exchange(asked: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def listed_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of a record, each as a template reads it.

    Raises:
        ValueError: they are none; the message says why.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is no list of messages, or an empty one")
    return [_message(message, place) for place, message in enumerate(messages)]


def _message(message: Any, place: int) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is not an object but {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role is unknown: {role!r}; known are {', '.join(ROLES)}")
    given = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in given and role == "assistant":
        calls = given["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise ValueError(f"{where}.tool_calls is no list of objects")
        given = {"content": ""} | given
    content = text_field(given, "content", where=f"{where}.")
    if role == "tool_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content, where)]}
    return {**given, "role": role, "content": content}


def _call(content: str, where: str) -> dict[str, Any]:
    try:
        call = json.loads(content)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"{where}.content is no tool call: JSON with `name` and `arguments`")
    return {"type": "function", "function": call}


def read_tools(tools: Any) -> list[Any]:
    """What may be called; written as JSON by some, as Parquet has no place for any object.

    Raises:
        ValueError: it is no list of objects.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"`tools` is not JSON: {error}") from None
        except RecursionError:
            raise ValueError("`tools` is nested too deeply") from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("`tools` is no list of objects")
    return tools


def text_field(
    fields: Mapping[str, Any], name: str, default: str | None = None, where: str = ""
) -> str:
    """The text of a field.

    Args:
        fields: of a record, or a message.
        name: of the field.
        default: for one that is missing, or null; None: it must be there.
        where: what stands before the name in messages.

    Raises:
        ValueError: it is missing, or no text.
    """
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, str):
        kind = "missing" if value is None else f"not a string but {type(value).__name__}"
        raise ValueError(f"`{where}{name}` is {kind}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{where}{name}` is not Unicode text (a lone surrogate)") from None
    return value


def cleaned_message(message: dict[str, Any], clean: Cleaner) -> dict[str, Any]:
    """The message with a cleaned text; with none, if nothing is left of it."""
    if message["content"]:
        message = message | {"content": clean(message["content"]) or ""}
    return message


def checked_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to its last answer.

    Raises:
        ValueError: it is none, or there is no answer in it.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message stands after another message")
    opening = [role for role in roles if role != "system"][:1]
    if opening != ["user"]:
        opening_role = opening[0] if opening else "nobody"
        raise ValueError(f"the conversation begins with {opening_role}, and not with the user")
    if "assistant" not in roles:
        raise ValueError("there is no answer: no message of the assistant")
    last = len(roles) - roles[::-1].index("assistant")
    for place, message in enumerate(messages[:last]):
        if message["role"] != "tool" and not (message["content"] or message.get("tool_calls")):
            what = "empty answer" if message["role"] == "assistant" else "empty message"
            raise ValueError(f"{what}: messages[{place}], of the {message['role']}")
    return messages[:last]


def question_group(messages: list[dict[str, Any]]) -> str:
    """The group of conversations in which the same is asked first."""
    asked = next(message["content"] for message in messages if message["role"] == "user")
    return hashlib.blake2b(asked.encode(), digest_size=16, key=b"question").hexdigest()


def json_line(value: Mapping[str, Any]) -> str:
    """What is read of a record, as a line of JSON.

    Raises:
        ValueError: it cannot be written as such.
    """
    _check_depth(value, _DEEPEST)
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
        return text
    except UnicodeEncodeError:
        raise ValueError("not Unicode text (a lone surrogate)") from None
    except (TypeError, ValueError):  # of Parquet: a date, or bytes
        raise ValueError("holds what JSON cannot write") from None


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"nested too deeply: more than {_DEEPEST} lists and objects in each other")
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for inner in value:
        _check_depth(inner, left - 1)
