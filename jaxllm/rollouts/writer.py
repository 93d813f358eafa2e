"""What writes the responses of a policy, with the results that it asks a calculator for."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxllm.data.prompts import Prompt
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Completion, Request, Sampling, seed_of
from jaxllm.objectives.objective import Params
from jaxllm.rollouts.calculator import CALL, result_of
from jaxllm.rollouts.responses import Response
from jaxllm.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes with given parameters."""

    prompts: Callable[[int], Prompt]
    """The training prompt of any number, in the order in which they are asked."""
    engine: Callable[[Params], Engine]
    """What writes, of all parameters."""
    tokenizer: Tokenizer
    sampling: Sampling
    """How tokens are chosen in rollouts."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response, beside the one that ends a document."""
    group_size: int
    """Responses to each prompt."""
    calculator: bool = False
    """Whether calculations are gone on with by their results."""

    def rollout(
        self, params: Params, number: int, rows: int, seed: int
    ) -> tuple[list[Prompt], list[Response]]:
        """The prompts of a rollout, each as often as it is answered, and the answers.

        Args:
            params: of all models.
            number: of the rollout.
            rows: responses of one.
            seed: of the draws.
        """
        count = rows // self.group_size
        prompts = [self.prompts(number * count + place) for place in range(count)]
        asked = [prompt for prompt in prompts for _ in range(self.group_size)]
        seeds = [seed_of(seed, number * rows + row) for row in range(rows)]
        return asked, self(params, asked, seeds, self.sampling)

    def __call__(
        self, params: Params, asked: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        """The response to each prompt, drawn by the seed at its place."""
        engine = self.engine(params)
        pause = CALL if self.calculator else ""
        drafts = [
            _Draft(Request(prompt.ids, sampling, seed, self.stop_ids, pause=pause))
            for prompt, seed in zip(asked, seeds, strict=True)
        ]
        going_on = drafts
        while going_on:
            completions = engine.complete([draft.request for draft in going_on])
            for draft, completion in zip(going_on, completions, strict=True):
                draft.extend(completion)
            going_on = [draft for draft in going_on if draft.answered(self.tokenizer)]
        return [draft.response() for draft in drafts]


class _Draft:
    """A response while it is written, by the policy and by the calculator."""

    def __init__(self, request: Request) -> None:
        self._asked, self._finish, self._text = request, "", ""
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        self._chosen: list[bool] = []

    @property
    def request(self) -> Request:
        """For what is still to be written; keys are by position, so none is drawn by twice."""
        sampling = dataclasses.replace(self._asked.sampling, max_new_tokens=self._room)
        return dataclasses.replace(
            self._asked, prompt=(*self._asked.prompt, *self._ids), sampling=sampling
        )

    @property
    def _room(self) -> int:
        return self._asked.sampling.max_new_tokens - len(self._ids)

    def extend(self, completion: Completion) -> None:
        """Takes what the policy has written."""
        self._put(completion.ids, completion.log_probs, True, completion.text)
        self._finish = completion.finish

    def answered(self, tokenizer: Tokenizer) -> bool:
        """Whether the policy is to go on, behind the result that it has asked for, if there is
        one and room for it."""
        if self._finish != "pause":
            return False
        if result := result_of(self._text):
            ids = tokenizer.encode(result)
            if len(ids) > self._room:
                return False
            self._put(ids, [0.0] * len(ids), False, result)
        return self._room > 0

    def response(self) -> Response:
        """All of it."""
        return Response(
            tuple(self._ids),
            tuple(self._log_probs),
            tuple(self._chosen),
            self._text,
            self._finish == "stop",
        )

    def _put(self, ids: Sequence[int], log_probs: Sequence[float], chosen: bool, text: str) -> None:
        self._ids += ids
        self._log_probs += log_probs
        self._chosen += [chosen] * len(ids)
        self._text += text
