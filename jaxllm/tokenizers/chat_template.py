"""Chat templates: messages become text, and token ids in which no message can forge a mark.

A template is Jinja source, as `AutoTokenizer` has it, run in Jinja's sandbox. It may be any text
from a file that somebody else made: it sees the messages and nothing of Python.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.errors import UserError
from jaxllm.tokenizers.builtin_templates import BUILTIN_TEMPLATES, suitable_template
from jaxllm.tokenizers.interface import Tokenizer, check_unicode

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template reads of a message."""

_ROLE = re.compile(r"[\w-]+")
_VERBATIM_KEYS = ("role", "type")  # names that templates ask for, not text that somebody wrote
_STEPS = 200_000  # of a rendering; conversations take some for each message
# A filter and a variable that no template can name.
_STEP, _WORK = "a step", "the steps left"
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
        veiled = self._render(
            [self._veiled(message) for message in messages],
            add_generation_prompt,
            self._veiled(tools),
        )
        spans = [match.span() for match in self._mark.finditer(text)]
        if veiled.translate({value: key for key, value in self._veil.items()}) == text:
            own = [span for span in spans if veiled[slice(*span)] == text[slice(*span)]]
        elif self._mark.findall(veiled) == [text[slice(*span)] for span in spans]:
            own = spans  # the template made more than stand-ins of a message, but no mark is new
        else:
            raise UserError(
                f"chat template ({self.name}): a message spells a special token of the tokenizer, "
                "and the template changes messages so that it cannot be told from a true one; "
                "leave it out of the message."
            )
        if len(own) == len(spans):
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
        literals = "\n".join(_searched_literals(_environment().parse(self.source)))
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

    def _encode_around(self, text: str, own: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of `text` in which only the marks at `own` are special tokens."""
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
    ) -> str:
        texts = {index: text for text, index in self._marks.items()}
        tokenizer = self.tokenizer
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        roles |= {"unk": tokenizer.unk_id} if tokenizer.unk_id is not None else {}
        work = _Work(_STEPS)
        try:
            text = _compiled(self.source).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                range=work.range,
                **{f"{role}_token": texts.get(index, "") for role, index in roles.items()},
                **{_WORK: work},
            )
            check_unicode([text])
            return text
        except Exception as error:  # of whatever the template does
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"chat template ({self.name}): {line}") from None


def chat_template(tokenizer: Tokenizer, named: str = "") -> ChatTemplate:
    """The template to chat with by a tokenizer.

    Args:
        tokenizer: what the template's text is encoded by.
        named: a name of `BUILTIN_TEMPLATES`, or a file of Jinja source; empty: the tokenizer's own,
            else the built-in one whose special tokens it has.

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
                f"config.template: {named} writes {', '.join(missing)}, which the tokenizer does "
                "not have as special tokens; name a file with a template that suits it."
            )
        template = ChatTemplate(source, tokenizer, named)
    elif named:
        try:
            source = Path(named).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"config.template: {named}: cannot be read ({reason}); name a file with Jinja "
                f"source, or one of {known}."
            ) from None
        template = ChatTemplate(source, tokenizer, named)
    else:
        found = tokenizer.chat_template or suitable_template(tokenizer.special_tokens())
        if found is None:
            raise UserError(
                "config.template: the tokenizer has no chat template, and the tokens of no "
                f"built-in one ({known}); name a file with Jinja source."
            )
        template = ChatTemplate(found, tokenizer)
    try:
        _compiled(template.source)
    except Exception as error:  # of whatever the source may be, as one that nests too deeply
        raise UserError(f"chat template ({template.name}): is no Jinja: {error}") from None
    return template


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` around what the assistant writes: only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@dataclasses.dataclass
class _Work:
    """The steps that a rendering may still take: it is to end in reasonable time."""

    left: int

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise jinja2.TemplateError(
                f"takes more than {_STEPS:,} steps; its loops, macros or products are too large"
            )

    def range(self, *arguments: int) -> range:
        numbers = range(*arguments)
        self.spend(len(numbers))
        return numbers


def _counted(tree: nodes.Template) -> nodes.Template:
    """`tree`, in which each run of what can run more than once takes a step."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
        step = nodes.Filter(nodes.Const(True), _STEP, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test:  # `for x in y if test`
            node.test = nodes.And(step, node.test, lineno=node.lineno)
    tree.set_environment(_environment())
    return tree


@jinja2.pass_context
def _step(context: Context, value: bool) -> bool:
    context[_WORK].spend(1)
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    """One in which operators take steps for what they make, before they make it."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context[_WORK].spend(_size(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """About how many characters, elements or bits an operator makes of small operands."""
    match operator, left, right:
        case "*", int(), int():
            return left.bit_length() + right.bit_length()
        case ("*", Sized() as row, int() as times) | ("*", int() as times, Sized() as row):
            return len(row) * max(times, 0)
        case "**", int(), int():
            return left.bit_length() * max(right, 0)
        case "%", str() | bytes(), _:  # widths and precisions, `*` being one among the operands
            numbers = right if isinstance(right, tuple) else ()
            widest = max((abs(n) for n in numbers if isinstance(n, int)), default=0)
            return sum(map(int, re.findall("[0-9]+", str(left)))) + str(left).count("*") * widest
    return 0


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as templates in tokenizer files are written for."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    del environment.globals["lipsum"]  # filler text of any length
    environment.filters["tojson"] = _to_json
    environment.filters[_STEP] = _step
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(_counted(_environment().parse(source)))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


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
