"""A conversation with a model: what is asked of it for each answer."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.errors import UserError
from jaxllm.inference.requests import Request, Sampling, seed_of
from jaxllm.tokenizers.chat_template import ChatTemplate, Message


class Asked(NamedTuple):
    """The request for an answer."""

    request: Request
    left_out: int
    """How many of the oldest messages did not fit."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a model is asked: messages laid out by a template, within what it can see."""

    template: ChatTemplate
    context: int
    """Tokens that the model can see, its answer included; 0: no limit is known."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Of the draws: the same messages get the same answer."""

    def ask(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Asked:
        """The request for the answer to `messages`, of which the last is the user's.

        Each answer has a seed of its own, made of `seed` and of how many messages of the user's
        there are. If the conversation and an answer of `max_new_tokens` (but of no more than half
        of the context) do not fit into the context, the oldest turns are left out, a turn being a
        message of the user's with all that follows it; a system message stays.

        Args:
            messages: of the conversation so far.
            tools: what the model may call, as JSON schemas.

        Raises:
            UserError: the last message does not fit, alone or with the system message; the template
                writes nothing; or as `ChatTemplate.encode`.
        """
        context = self.context or sys.maxsize
        room = context - min(self.sampling.max_new_tokens, context // 2)
        encode = functools.partial(
            self.template.encode, add_generation_prompt=True, tools=tools or None
        )
        ids, kept = encode(messages), messages
        while len(ids) > room and len(shorter := _without_oldest_turn(kept)) < len(kept):
            ids, kept = encode(shorter), shorter
        if not ids:
            raise UserError(f"chat template ({self.template.name}): writes nothing of the messages")
        left = context - len(ids)
        if left < 1:
            longest = max(kept, key=lambda message: len(str(message.get("content", ""))))
            what = "the system message" if longest["role"] == "system" else "the message"
            raise UserError(
                f"{what} makes {len(ids)} tokens with what goes with it, and the model can see "
                f"{self.context}: too long to be answered; shorten it."
            )
        turn = sum(message["role"] == "user" for message in messages)
        most = min(self.sampling.max_new_tokens, left)
        request = Request(
            tuple(ids),
            dataclasses.replace(self.sampling, max_new_tokens=most),
            seed_of(self.seed, turn),
            self.template.stop_ids,
        )
        return Asked(request, len(messages) - len(kept))


def _without_oldest_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """All but the first message of the user's and what follows it; the last turn is never left."""
    first = 1 if messages[0]["role"] == "system" else 0
    later = (
        place for place in range(first + 1, len(messages)) if messages[place]["role"] == "user"
    )
    start = next(later, first)
    return [*messages[:first], *messages[start:]]
