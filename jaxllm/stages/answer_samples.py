"""What a model that is being trained answers to a few questions, at each evaluation."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxllm.data.corpus import Corpus
from jaxllm.data.split import HELD_OUT
from jaxllm.errors import UserError
from jaxllm.inference.chat import Chat
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Request
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Params
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.processes import is_main
from jaxllm.stages.fields import ModelTrainingFields, SamplingFields
from jaxllm.stages.training_run import TrainingRun
from jaxllm.tokenizers.chat_template import ChatTemplate, Message

_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class AnsweringConfig(ModelTrainingFields, SamplingFields):
    """A model trained to answer: what such stages have in common."""

    prompt: str = ""
    """What the samples answer; empty: what the first held-out conversations ask."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""

    def __post_init__(self) -> None:
        ModelTrainingFields.__post_init__(self)
        SamplingFields.__post_init__(self)


C = TypeVar("C", bound=AnsweringConfig)


def answer_samples(
    run: TrainingRun[C],
    corpus: Corpus,
    template: ChatTemplate,
    model: TransformerConfig,
    context: int,
    opening: Callable[[Mapping[str, Any]], Sequence[Message]],
) -> Callable[[int, Params], None]:
    """What writes the model's own answers to a few questions.

    Args:
        run: whose configuration says how to write, and perhaps what is asked.
        corpus: whose held-out documents ask otherwise.
        template: by which the model is spoken to.
        model: what answers.
        context: tokens of a question and its answer at most, if the model has no limit.
        opening: the messages that an answer is to follow, of a document; none: it asks nothing.

    Raises:
        UserError: the configured prompt leaves no room for one.
    """
    context = model.max_positions or context
    asked = list(_questions(run.config, corpus, template, context, opening))

    def write(step: int, params: Params) -> None:
        engine = Engine(model, params, template.tokenizer, context=context)
        answers = engine.complete([request for _, request in asked])
        if is_main():
            samples = [
                (question, answer.text)
                for (question, _), answer in zip(asked, answers, strict=True)
            ]
            append_samples(run.directory.samples, step, samples)

    return write


def _questions(
    config: AnsweringConfig,
    corpus: Corpus,
    template: ChatTemplate,
    context: int,
    opening: Callable[[Mapping[str, Any]], Sequence[Message]],
) -> Iterator[tuple[str, Request]]:
    """What samples are to answer: the prompt that is configured, else what is first asked in some
    of the held-out conversations that leave room for an answer."""
    chat = Chat(template, context, config.sampling(), config.seed)
    if config.prompt:
        yield config.prompt, chat.ask([{"role": "user", "content": config.prompt}]).request
        return
    asked: list[Sequence[Message]] = []
    for text in corpus.split.texts(HELD_OUT):
        record = json.loads(text)
        messages = opening(record)
        if messages and messages not in asked:
            with contextlib.suppress(UserError):  # it is too long
                yield messages[-1]["content"], chat.ask(messages, record.get("tools")).request
                asked.append(messages)
        if len(asked) == _SAMPLES:
            return
