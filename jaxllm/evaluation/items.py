"""Items of tasks from records: what is asked, what is right, and how an example shows it.

The kind of a task is told by the fields of its records (`KINDS`); docs/evaluating.md shows each.
"""

import dataclasses
import numbers
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.errors import UserError
from jaxllm.evaluation.instructions import rules_of

_CHINESE = re.compile("[\u3400-\u9fff]")
_FINAL_ANSWER = re.compile(r"####[ \t]*(\S.*?)\s*$")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How questions are put."""

    chain_of_thought: bool = False
    """Whether the reasoning before an answer is asked for, and shown in examples."""
    letters: bool = True
    """Whether the choices of a `question` are listed, and their letters scored."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task."""

    prompt: str
    """What the model is given; what precedes each option where there are options."""
    answer: str
    """What an example shows behind its prompt, the white space between them included."""
    options: tuple[tuple[str, str], ...] = ()
    """What the model chooses from: (end of the context, continuation), white space included."""
    gold: int = 0
    """Place of the right option."""
    target: str = ""
    """The right answer of a question that is answered in writing."""
    cue: str = ""
    """Ends a prompt that no example stands before."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    choices: tuple[str, ...] = ()
    """The texts of the options, whatever is scored of them, by which a copy is recognised."""
    rules: tuple[Mapping[str, Any], ...] = ()
    """What a response must keep to, for `evaluation.instructions`."""
    content: str = ""
    """The record's own question or text, by which it is recognised in training text."""
    subject: str = ""
    """Examples of the same subject are taken first."""
    line: int = 0
    """Where it stands in its source, counted from 1."""

    @property
    def text(self) -> str:
        """All of it, with what is right: what it would look like in training text."""
        return self.prompt + self.answer


@dataclasses.dataclass(frozen=True)
class Kind:
    """Records of certain fields, and how they are asked and scored."""

    fields: tuple[str, ...]
    """Records that have all of these are of this kind, unless of one listed before."""
    measure: str
    """`choice`: the likeliest of several options; `continuation`: whether the only option is what
    the model would write; `answer`: exact match of what it writes; `instructions`: rules kept."""
    parse: Callable[[Mapping[str, Any], Layout], Item]
    """The item of a record; a ValueError says what is wrong with the record."""


def kind_of(fields: Mapping[str, Any]) -> Kind | None:
    """The first kind whose fields a record has."""
    return next((kind for kind in KINDS if all(name in fields for name in kind.fields)), None)


def known_fields() -> str:
    """The fields of every kind, for messages."""
    return "; ".join(", ".join(kind.fields) for kind in KINDS)


def _query(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A query as it stands; one that is a `Question:` gets a line `Answer:` if it has none."""
    content = query = _text(fields, "query").rstrip()
    if re.search("^Question:", query, re.MULTILINE) and not query.endswith("Answer:"):
        query += "\nAnswer:"
    choices = _choices(fields)
    gold = _place(fields, "gold", len(choices))
    return _choice_item(query, choices, choices, gold, content)


def _question(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A question with lettered choices, or the choices' own texts as answers to it."""
    question, choices = _text(fields, "question").strip(), _choices(fields)
    gold = _place(fields, "answer", len(choices))
    if not layout.letters:
        return _choice_item(_asked(question), choices, choices, gold, question)
    if len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"`choices` has {len(choices)} texts, more than there are letters")
    letters = string.ascii_uppercase[: len(choices)]
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([question, *listed, _words(question)[1]])
    return _choice_item(prompt, letters, choices, gold, question)


def _choice_item(
    prompt: str, scored: Sequence[str], choices: tuple[str, ...], gold: int, content: str
) -> Item:
    options = tuple(("", f" {text}") for text in scored)
    return Item(prompt, options[gold][1], options, gold, choices=choices, content=content)


def _context_options(fields: Mapping[str, Any], layout: Layout) -> Item:
    """The same continuation after each of several contexts (Trinh & Le 2018,
    https://arxiv.org/abs/1806.02847, "partial scoring")."""
    contexts = _choices(fields, "context_options")
    continuation = f" {_text(fields, 'continuation').strip()}"
    gold = _place(fields, "gold", len(contexts))
    options = tuple((context.rstrip(), continuation) for context in contexts)
    texts = tuple(map("".join, options))
    return Item("", texts[gold], options, gold, choices=texts, content=texts[gold])


def _continuation(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A text and how it goes on, as in LAMBADA."""
    continuation = f" {_text(fields, 'continuation').strip()}"
    context = _text(fields, "context").rstrip()
    return Item(context, continuation, (("", continuation),), content=context + continuation)


def _prompt(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A prompt as it stands, followed by its answer as in the record's `text`, if it has one."""
    prompt, target = _text(fields, "prompt").rstrip(), _answer(fields)
    shown, stop = target, ("\n",)
    if layout.chain_of_thought:
        shown, stop = _optional_text(fields, "response") or target, ("\n\n",)
    text, between = fields.get("text"), "\n"
    if isinstance(text, str) and text.startswith(f"{prompt} "):
        between = " "
    # A space is left for the model to write, because tokens begin with it.
    given = f"{prompt}\n" if between == "\n" else prompt
    answer = shown if between == "\n" else f" {shown}"
    return Item(given, answer, target=target, stop=stop, content=prompt)


def _instructions(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A prompt, and rules that a response can be checked by."""
    try:
        prompt = _text(fields, "prompt")
        return Item(prompt, "", rules=tuple(rules_of(fields)), content=prompt)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _reasoning(fields: Mapping[str, Any], layout: Layout) -> Item:
    question, target = _text(fields, "question").strip(), _answer(fields)
    return _worked(question, _text(fields, "reasoning").strip(), target, layout)


def _gsm8k(fields: Mapping[str, Any], layout: Layout) -> Item:
    """A worked answer whose last line is `#### n`."""
    question, answer = _text(fields, "question").strip(), _text(fields, "answer").strip()
    final = _FINAL_ANSWER.search(answer)
    if final is None:
        raise ValueError("`answer` does not end in `#### ` and the result")
    return _worked(question, answer[: final.start()].strip(), final[1].replace(",", ""), layout)


def _svamp(fields: Mapping[str, Any], layout: Layout) -> Item:
    question, reasoning = _text(fields, "context"), _optional_text(fields, "chain_of_thought")
    return _worked(question.strip(), reasoning.strip(), _answer(fields), layout)


def _worked(question: str, reasoning: str, target: str, layout: Layout) -> Item:
    prompt, (first, _, cue) = _asked(question), _words(question)
    if not layout.chain_of_thought:
        return Item(prompt, f" {target}", target=target, stop=("\n",), content=question)
    worked = f" {reasoning}\n#### {target}" if reasoning else f" #### {target}"
    return Item(prompt, worked, target=target, cue=cue, stop=(first,), content=question)


def _asked(question: str) -> str:
    first, last, _ = _words(question)
    return f"{first}{'' if first.endswith('：') else ' '}{question}\n{last}"


def _words(question: str) -> tuple[str, str, str]:
    """What stands before a question and before its answer, and Kojima et al.'s cue for reasoning
    (2022, https://arxiv.org/abs/2205.11916), in the language of the question."""
    if _CHINESE.search(question):
        return "问题：", "答案：", " 让我们一步一步地思考。"
    return "Question:", "Answer:", " Let's think step by step."


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is not a string but {type(value).__name__}")
    return _checked(value, name)


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    """The same of a field that may be missing, null or blank: then it is empty."""
    value = fields.get(name)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else _text(fields, name)


def _checked(value: str, name: str) -> str:
    if not value.strip():
        raise ValueError(f"`{name}` holds an empty text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` is not Unicode text (a lone surrogate)") from None
    return value


def _answer(fields: Mapping[str, Any]) -> str:
    """The field `answer`, a text or a number."""
    value = fields["answer"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _text(fields, "answer").strip()


def _choices(fields: Mapping[str, Any], name: str = "choices") -> tuple[str, ...]:
    values = fields[name]
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` is not a list of strings")
    if len(values) < 2:
        raise ValueError(f"`{name}` has {len(values)} texts, and two are the fewest")
    return tuple(_checked(value, name) for value in values)


def _place(fields: Mapping[str, Any], name: str, count: int) -> int:
    """Which of `count` choices is right: an index from 0, or a letter."""
    value = fields[name]
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().isascii():
        value = string.ascii_uppercase.find(value.strip().upper())
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` is {fields[name]!r}, which is no index and no letter")
    if not 0 <= int(value) < count:
        raise ValueError(
            f"`{name}` is {fields[name]!r}, and there are {count} choices, from 0 or A"
        )
    return int(value)


KINDS = (
    Kind(("context_options", "continuation", "gold"), "choice", _context_options),
    Kind(("query", "choices", "gold"), "choice", _query),
    Kind(("question", "choices", "answer"), "choice", _question),
    Kind(("prompt", "rules"), "instructions", _instructions),
    Kind(("prompt", "instruction_id_list", "kwargs"), "instructions", _instructions),
    Kind(("prompt", "answer"), "answer", _prompt),
    Kind(("question", "reasoning", "answer"), "answer", _reasoning),
    Kind(("question", "answer"), "answer", _gsm8k),
    Kind(("context", "continuation"), "continuation", _continuation),
    Kind(("context", "answer"), "answer", _svamp),
)
"""Kinds of tasks by the fields of their records, in the order in which they are tried."""
