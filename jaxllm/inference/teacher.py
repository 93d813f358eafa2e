"""Who answers questions: a protocol, and the teacher that is a model on this machine."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxllm.errors import UserError
from jaxllm.inference.chat import Chat
from jaxllm.inference.requests import Completion, Request, seed_of
from jaxllm.inference.trained import TrainedModel
from jaxllm.tokenizers.chat_template import Message

_THINK = "<think>"
_OPENED = 16  # tokens at the end of a prompt in which a template may have begun the thinking
_CALLS = 4  # times as many texts are asked for at once as are written at once


class Question(NamedTuple):
    """What is asked, several times."""

    number: int
    """Its place among all questions, from which seeds are made."""
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


class Answer(NamedTuple):
    """A response to a question."""

    text: str
    """With the thinking before it, `<think>…</think>`, if the teacher shows it."""
    finish: str
    """Why it ends: `stop`, or `length` where it was cut off."""
    tokens: int | None
    """How many it has, by the teacher's tokenizer, if that tells."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """What became of a question that was not answered."""

    reason: str


Outcome = tuple[Question, Sequence[Answer] | Failed]
"""A question, and all answers to it, or why there are none."""


@runtime_checkable
class Teacher(Protocol):
    """Who answers."""

    def answer(self, questions: Sequence[Question]) -> Iterator[list[Outcome]]:
        """What becomes of the questions, some at a time, in any order.

        Raises:
            UserError: no question can be answered, or not as it is asked.
        """
        ...


def sample_seed(seed: int, question: int, sample: int, samples: int) -> int:
    """Of the draws of one answer; one that any endpoint takes."""
    return seed_of(seed, question * samples + sample) % 2**31


def with_thinking(thinking: str, text: str) -> str:
    """A response with what was thought before it; thinking that no response follows has no end."""
    if not thinking or _THINK in text:
        return text
    return f"{_THINK}{thinking}</think>{text}" if text else f"{_THINK}{thinking}"


@dataclasses.dataclass(frozen=True)
class LocalTeacher:
    """A model on this machine. The mesh must be set."""

    model: TrainedModel
    chat: Chat
    """How it is asked."""
    samples: int = 1
    """Answers to each question."""
    done: frozenset[int] = frozenset()
    """Numbers of questions that are answered already."""

    def answer(self, questions: Sequence[Question]) -> Iterator[list[Outcome]]:
        """See `Teacher`. What is written beside a text may round it differently, so the same
        questions are always asked together: those that are done are asked again where one beside
        them is not."""
        size = max(1, _CALLS * self.model.slots // self.samples)
        for begin in range(0, len(questions), size):
            together = questions[begin : begin + size]
            if any(question.number not in self.done for question in together):
                outcomes = self._answered(together)
                yield [each for each in outcomes if each[0].number not in self.done]

    def _answered(self, questions: Sequence[Question]) -> list[Outcome]:
        requests = [self._requests(question) for question in questions]
        asked = [each for each in requests if not isinstance(each, Failed)]
        written = iter(self.model.complete(list(itertools.chain.from_iterable(asked))))
        return [
            (question, each)
            if isinstance(each, Failed)
            else (question, [self._answer(request, next(written)) for request in each])
            for question, each in zip(questions, requests, strict=True)
        ]

    def _requests(self, question: Question) -> list[Request] | Failed:
        """A request for each answer; none where the question is too long."""
        try:
            asked = self.chat.ask(question.messages, question.tools)
        except UserError as error:
            return Failed(str(error))
        if asked.left_out:
            return Failed(f"is longer than the {self.chat.context} tokens that the model can see")
        return [
            dataclasses.replace(
                asked.request,
                seed=sample_seed(self.chat.seed, question.number, sample, self.samples),
            )
            for sample in range(self.samples)
        ]

    def _answer(self, request: Request, written: Completion) -> Answer:
        """An answer; the thinking that the template has begun, and so the model has not, is begun
        in it too."""
        tokenizer = self.chat.template.tokenizer
        before = tokenizer.decode(request.prompt[-_OPENED:], skip_special_tokens=False)
        opened = before.rstrip().endswith(_THINK) and not written.text.lstrip().startswith(_THINK)
        text = f"{_THINK}{written.text}" if opened else written.text
        return Answer(text, written.finish, len(written.ids))
