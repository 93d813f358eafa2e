"""What tasks ask of a model: the likelihood of texts, and texts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxllm.inference.requests import Request, Sampling, seed_of
from jaxllm.inference.scoring import (
    LogLikelihood,
    Pair,
    encode_pairs,
    log_likelihoods,
    not_finite,
    opened,
)
from jaxllm.inference.trained import TrainedModel
from jaxllm.objectives.pretraining import KINDS
from jaxllm.tokenizers.chat_template import ChatTemplate

_CONTEXT = 2048


class Written(NamedTuple):
    """A text that a model wrote."""

    text: str
    left_out: int
    """Tokens at the beginning of the prompt that did not fit."""


@runtime_checkable
class TextModel(Protocol):
    """A model of text, whatever it is made of."""

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Of each (context, continuation), the log-likelihood of the continuation.

        White space between the two belongs to the continuation.
        """
        ...

    def write(self, prompts: Sequence[tuple[str, Sampling]]) -> list[Written]:
        """Continues each prompt."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainedTextModel:
    """A `TextModel` of a trained model; the mesh must be set.

    What is too long for the model's context loses its beginning.
    """

    trained: TrainedModel
    batch_size: int = 32
    """Rows scored at once, over all devices."""
    template: ChatTemplate | None = None
    """Contexts and prompts are the messages of a user, written by this; None: the beginnings of
    documents."""
    seed: int = 0
    """Of what is drawn in writing."""
    report: Callable[[str, int, int], None] = lambda phase, done, total: None
    """Progress, as `reporting.phases.Phases` takes it."""

    @property
    def limit(self) -> int:
        """Tokens that are read at once: the model's context or, where none is known, 2,048."""
        return self.trained.loaded.context or _CONTEXT

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """As the protocol says; the answer to a message begins without white space."""
        tokenizer = self.trained.loaded.tokenizer
        if self.template is None:
            return self.score(encode_pairs(tokenizer, texts))
        answers = tokenizer.encode_batch([answer.lstrip() for _, answer in texts])
        questions = [self._message(question) for question, _ in texts]
        return self.score([Pair(q, tuple(a)) for q, a in zip(questions, answers, strict=True)])

    def write(self, prompts: Sequence[tuple[str, Sampling]]) -> list[Written]:
        """As the protocol says; until the end of the document, or of the assistant's turn."""
        tokenizer = self.trained.loaded.tokenizer
        if self.template is not None:
            stop_ids = self.template.stop_ids
            return self.proceed([(self._message(text), how) for text, how in prompts], stop_ids)
        encoded = tokenizer.encode_batch([prompt for prompt, _ in prompts])
        return self.proceed(
            [(opened(ids, tokenizer), how) for ids, (_, how) in zip(encoded, prompts, strict=True)]
        )

    def score(self, pairs: Sequence[Pair]) -> list[LogLikelihood]:
        """`scoring.log_likelihoods` of token ids."""
        loaded = self.trained.loaded
        return log_likelihoods(
            loaded.model,
            loaded.params,
            pairs,
            context=self.limit,
            batch_size=self.batch_size,
            prompt_is_prefix=KINDS[self.trained.objective.kind].prompt_is_prefix,
            report=lambda done, total: self.report("score", done, total),
        )

    def proceed(
        self, prompts: Sequence[tuple[tuple[int, ...], Sampling]], stop_ids: tuple[int, ...] = ()
    ) -> list[Written]:
        """Continues token ids.

        A prompt keeps what the new tokens leave of the context, but half of it in any case; then
        fewer new tokens are written.

        Raises:
            UserError: the model's outputs are not numbers.
        """
        context = self.limit
        requests = []
        for number, (ids, sampling) in enumerate(prompts):
            # The last new token is never fed.
            kept = ids[-max(context - sampling.max_new_tokens + 1, (context + 1) // 2) :]
            most = min(sampling.max_new_tokens, context - len(kept) + 1)
            sampling = dataclasses.replace(sampling, max_new_tokens=most)
            requests.append(Request(kept, sampling, seed_of(self.seed, number), stop_ids))
        completions = self.trained.complete(requests)
        if any(math.isnan(value) for completion in completions for value in completion.log_probs):
            raise not_finite()
        return [
            Written(completion.text, len(ids) - len(request.prompt))
            for completion, request, (ids, _) in zip(completions, requests, prompts, strict=True)
        ]

    def _message(self, text: str) -> tuple[int, ...]:
        assert self.template is not None
        asked = [{"role": "user", "content": text}]
        return tuple(self.template.encode(asked, add_generation_prompt=True))
