"""Chat templates: messages become text, and token ids in which no message can forge a mark.

A template is Jinja source, as `AutoTokenizer` has it, run in a sandbox (`template_sandbox.py`).
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import nodes

from jaxllm.errors import UserError
from jaxllm.tokenizers import template_sandbox
from jaxllm.tokenizers.answer_spans import Span, compared_spans, told_spans
from jaxllm.tokenizers.builtin_templates import BUILTIN_TEMPLATES, suitable_template
from jaxllm.tokenizers.interface import Tokenizer, check_unicode

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template reads of a message."""


class TrainedIds(NamedTuple):
    """A conversation to learn from."""

    ids: list[int]
    trained: list[bool]
    """Which of them the assistant writes: what it is to learn."""
    answers: list[tuple[int, int]]
    """Where each answer begins and ends."""


_ROLE = re.compile(r"[\w-]+")
_VERBATIM_KEYS = ("role", "type")  # names that templates ask for, not text that somebody wrote
_STAND_INS = range(0xFDD0, 0xFDF0)  # code points that are no characters, for good


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer whose tokens it writes; from `chat_template`."""

    source: str
    """Jinja source."""
    tokenizer: Tokenizer
    name: str = "the tokenizer's"
    """What messages call it."""

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation, as Transformers' `apply_chat_template` makes it.

        Args:
            messages: in order; keys beside `role` and `content` are given to the template too.
            add_generation_prompt: also write what an answer of the assistant begins with.
            tools: what the model may call, as JSON schemas.

        Raises:
            UserError: the template refuses the messages, is faulty, takes too many steps or writes
                what is no Unicode; or a message has no role, or holds what is no Unicode.
        """
        _check(messages)
        return self._render(messages, add_generation_prompt, tools)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The token ids of what `render` writes: marks by the template are special tokens.

        What spells a special token in a message stays the characters it is made of. To tell the
        two apart, the conversation is rendered once more with stand-ins for the characters of
        marks in messages. Where a template searches an assistant's messages for a mark, as for
        `</think>`, to take them apart there, the mark counts as the template's; never so one that
        ends a turn.

        Raises:
            UserError: as `render`; or a message spells a special token, and the template changes
                messages so that the two cannot be told apart.
        """
        text = self.render(messages, add_generation_prompt, tools)
        return self._encode(text, self._own_marks(text, messages, add_generation_prompt, tools))

    def encode_trained(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> TrainedIds:
        """The token ids of a whole conversation, and which of them are the assistant's answers with
        what ends their turns.

        Answers are known by the template's `{% generation %}` blocks, else by what changes in its
        text with them (`answer_spans.py`). A token that would reach over the beginning or end of
        an answer is cut there, as it is when the answer is written after its prompt.

        Raises:
            UserError: as `encode`.
        """
        text = self.render(messages, False, tools)
        marks = self._own_marks(text, messages, False, tools)
        ids = self._encode(text, marks)
        spans = self._answer_spans(text, messages, tools)
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        heads = [
            self._encode(text[:edge], [span for span in marks if span[1] <= edge]) for edge in edges
        ]
        if all(ids[: len(head)] == head for head in heads):
            bounds = list(map(len, heads))
        else:
            parts = []
            for begin, end in itertools.pairwise(edges):
                inside = [(a - begin, b - begin) for a, b in marks if begin <= a and b <= end]
                parts.append(self._encode(text[begin:end], inside))
            ids = list(itertools.chain(*parts))
            bounds = [0, *itertools.accumulate(map(len, parts))]
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
        trained = [number % 2 == 1 for number, size in enumerate(sizes) for _ in range(size)]
        return TrainedIds(ids, trained, list(itertools.pairwise(bounds))[1::2])

    def _answer_spans(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[Span]:
        def render(
            messages: Sequence[Message],
            add_generation_prompt: bool = False,
            edges: tuple[str, str] = ("", ""),
        ) -> str:
            return self._render(messages, add_generation_prompt, tools, edges)

        told = None
        if self._tells_generation:
            told = told_spans(text, lambda edges: render(messages, edges=edges))
        return compared_spans(text, messages, render, self._mark) if told is None else told

    def _own_marks(
        self,
        text: str,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[Span]:
        """Where in `text` the template has written marks, rather than a message spelt them."""
        try:
            hidden, hidden_tools = [self._veiled(each) for each in messages], self._veiled(tools)
        except RecursionError:
            raise UserError(
                f"chat template ({self.name}): a message or tool is nested too deeply."
            ) from None
        veiled = self._render(hidden, add_generation_prompt, hidden_tools)
        spans = [match.span() for match in self._mark.finditer(text)]
        if veiled.translate({value: key for key, value in self._veil.items()}) == text:
            return [span for span in spans if veiled[slice(*span)] == text[slice(*span)]]
        if self._mark.findall(veiled) == [text[slice(*span)] for span in spans]:
            return spans  # the template made more than stand-ins of a message, but no mark is new
        raise UserError(
            f"chat template ({self.name}): a message spells a special token of the tokenizer, "
            "and the template changes messages so that it cannot be told from a true one; "
            "leave it out of the message."
        )

    def _encode(self, text: str, own: Sequence[Span]) -> list[int]:
        """Ids of a text in which the marks at `own` alone are special tokens."""
        if len(own) == len(self._mark.findall(text)):
            ids = self.tokenizer.encode(text, parse_special_tokens=True)
            expected = [self._marks[text[slice(*span)]] for span in own]
            read = set(self._marks.values()) - {self.tokenizer.unk_id}
            # Not so where the tokenizer changes other text, as `<|IM_END|>`, into marks.
            if [index for index in ids if index in read] == expected:
                return ids
        return self._encode_around(text, own)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the one after an assistant's content, and the document's end.

        A template that refuses a conversation which has it tell the first, even one with a system
        message, leaves the second alone.
        """
        # No words of a template: names for the places of the answer and of the other messages.
        answer, other = "".join(map(chr, _STAND_INS[-2:])), chr(_STAND_INS[-3])
        ids = {self.tokenizer.eos_id}
        for roles in (("user", "assistant", "user"), ("system", "user", "assistant", "user")):
            contents = (answer if role == "assistant" else other for role in roles)
            messages = zip(roles, contents, strict=True)
            with contextlib.suppress(UserError):
                text = self._render([{"role": r, "content": c} for r, c in messages], False, None)
                mark = self._mark.match(text.partition(answer)[2].lstrip())
                return tuple(sorted(ids | ({self._marks[mark[0]]} if mark else set())))
        return tuple(ids)

    @functools.cached_property
    def _tells_generation(self) -> bool:
        return template_sandbox.tells_generation(self.source)

    @functools.cached_property
    def _marks(self) -> dict[str, int]:
        return self.tokenizer.special_tokens()

    @functools.cached_property
    def _mark(self) -> re.Pattern[str]:
        return _any_of(self._marks)

    @functools.cached_property
    def _veil(self) -> dict[int, int]:
        """From the characters that make a mark one to stand-ins of the same length."""
        signs = {sign for mark in self._marks for sign in re.findall(r"[^\w\s]", mark) or mark[0]}
        spare = (*_STAND_INS, *range(0xF0000, 0xF0000 + len(signs)))
        return {ord(sign): spare[place] for place, sign in enumerate(sorted(signs))}

    @functools.cached_property
    def _searched(self) -> re.Pattern[str]:
        """The marks that the template searches messages for."""
        literals = "\n".join(_searched_literals(template_sandbox.parse(self.source)))
        found = set(self._mark.findall(literals))
        return _any_of(mark for mark in found if self._marks[mark] not in self.stop_ids)

    def _veiled(self, value: Any, keep: bool = False) -> Any:
        """`value` with stand-ins in all of its texts; with `keep`, not in marks searched for."""
        if isinstance(value, str) and keep:
            marks, others = self._searched.findall(value), self._searched.split(value)
            veiled = [other.translate(self._veil) for other in others]
            return "".join(a + b for a, b in zip(veiled, [*marks, ""], strict=True))
        if isinstance(value, str):
            return value.translate(self._veil)
        if isinstance(value, Mapping):
            keep = keep or value.get("role") == "assistant"
            return {
                key: inner if key in _VERBATIM_KEYS else self._veiled(inner, keep)
                for key, inner in value.items()
            }
        if isinstance(value, Sequence):
            return [self._veiled(inner, keep) for inner in value]
        return value

    def _encode_around(self, text: str, own: Sequence[Span]) -> list[int]:
        """The same, of the texts between the marks each for itself."""
        ends = [0, *(end for _, end in own)]
        begins = [*(begin for begin, _ in own), len(text)]
        between = [text[end:begin] for end, begin in zip(ends, begins, strict=True)]
        marks = [[self._marks[text[begin:end]]] for begin, end in own]
        parts = zip(self.tokenizer.encode_batch(between), [*marks, []], strict=True)
        return [index for ids, mark in parts for index in (*ids, *mark)]

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        edges: tuple[str, str] = ("", ""),
    ) -> str:
        texts = {index: text for text, index in self._marks.items()}
        tokenizer = self.tokenizer
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        roles |= {"unk": tokenizer.unk_id} if tokenizer.unk_id is not None else {}
        variables = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **{f"{role}_token": texts.get(index, "") for role, index in roles.items()},
        }
        try:
            text = template_sandbox.render(self.source, variables, edges)
            check_unicode([text])
            return text
        except Exception as error:  # of whatever the template does
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"chat template ({self.name}): {line}") from None


def chat_template(
    tokenizer: Tokenizer, named: str = "", field: str = "config.template"
) -> ChatTemplate:
    """The template to chat with by a tokenizer.

    Args:
        tokenizer: what the template's text is encoded by.
        named: a name of `BUILTIN_TEMPLATES`, or a file of Jinja source; empty: the tokenizer's own,
            else the built-in one whose special tokens it has.
        field: of the configuration that names it, for messages.

    Raises:
        UserError: there is none; or the tokenizer lacks tokens of the built-in one named, or the
            file cannot be read, or is no Jinja.
    """
    known = ", ".join(BUILTIN_TEMPLATES)
    if named in BUILTIN_TEMPLATES:
        source, needed = BUILTIN_TEMPLATES[named]
        missing = [token for token in needed if token not in tokenizer.special_tokens()]
        if missing:
            raise UserError(
                f"{field}: {named} writes {', '.join(missing)}, which the tokenizer does "
                "not have as special tokens; name a file with a template that suits it."
            )
        template = ChatTemplate(source, tokenizer, named)
    elif named:
        try:
            source = Path(named).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"{field}: {named}: cannot be read ({reason}); name a file with Jinja "
                f"source, or one of {known}."
            ) from None
        template = ChatTemplate(source, tokenizer, named)
    else:
        found = tokenizer.chat_template or suitable_template(tokenizer.special_tokens())
        if found is None:
            raise UserError(
                f"{field}: the tokenizer has no chat template, and the tokens of no "
                f"built-in one ({known}); name a file with Jinja source."
            )
        template = ChatTemplate(found, tokenizer)
    try:
        template_sandbox.compiled(template.source)
    except Exception as error:  # of whatever the source may be, as one that nests too deeply
        raise UserError(f"chat template ({template.name}): is no Jinja: {error}") from None
    return template


def _searched_literals(tree: nodes.Template) -> Iterator[str]:
    """Strings that a template compares with or hands to methods and filters."""
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        assert isinstance(node, nodes.Compare | nodes.Call | nodes.Filter)
        for part in [node] if isinstance(node, nodes.Compare) else node.args:
            for literal in [part, *part.find_all(nodes.Const)]:
                if isinstance(literal, nodes.Const) and isinstance(literal.value, str):
                    yield literal.value


def _any_of(marks: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the marks, the longest first; of none it matches nothing."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("messages: there are none; give at least one.")
    for place, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise UserError(f"messages[{place}].role: must be a name such as user; was {role!r}.")
        content = message.get("content")
        if isinstance(content, str):
            try:
                content.encode()
            except UnicodeEncodeError:
                raise UserError(f"messages[{place}].content: is not Unicode text.") from None
