"""Rollouts of a student that learns of a teacher rather than by rewards: a share of them it writes
itself, the others are given (GKD: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.data.continuations import FOLLOWED
from jaxllm.data.permutation import Permutation
from jaxllm.data.prompts import Prompt
from jaxllm.inference.requests import seed_of
from jaxllm.objectives.objective import Batch, Params
from jaxllm.rollouts.judging import Judged
from jaxllm.rollouts.responses import Response
from jaxllm.rollouts.source import Scalars
from jaxllm.rollouts.writer import Writer


@dataclasses.dataclass(frozen=True)
class PartlyWritten:
    """Has some prompts of a rollout gone on from by the student, and the others by what followed
    them where they were found (`data.continuations`)."""

    writer: Writer
    share: float
    """Of the responses of a rollout that the student writes."""

    def rollout(
        self, params: Params, number: int, rows: int, seed: int
    ) -> tuple[list[Prompt], list[Response]]:
        """As `Writer.rollout`; which are written is drawn anew for each rollout."""
        asked = [self.writer.prompts(number * rows + row) for row in range(rows)]
        order = Permutation(rows, f"{seed} written {number}")
        own = sorted(order(place) for place in range(round(self.share * rows)))
        seeds = [seed_of(seed, number * rows + row) for row in own]
        found = self.writer(params, [asked[row] for row in own], seeds, self.writer.sampling)
        written = dict(zip(own, found, strict=True))
        return asked, [written.get(row) or self._given(asked[row]) for row in range(rows)]

    def _given(self, prompt: Prompt) -> Response:
        ids = prompt.record[FOLLOWED]
        tokenizer = self.writer.tokenizer
        return Response(
            ids,
            (0.0,) * len(ids),
            (True,) * len(ids),
            tokenizer.decode(ids),
            ids[-1] in (tokenizer.eos_id, *self.writer.stop_ids),
        )


class Unjudged:
    """Nothing is said of what responses are worth."""

    names: tuple[str, ...] = ()

    def __call__(self, asked: Sequence[Prompt], written: Sequence[Response]) -> Judged:
        """No reward."""
        del asked
        return Judged(np.zeros(len(written)), {})


class AsTheyAre:
    """Responses are learnt from as they are."""

    name = "distill"
    names: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    def __call__(
        self,
        rows: Batch,
        scores: Float[Array, " rows"],
        ended: Bool[Array, " rows"],
        kl_coef: Float[Array, ""],
    ) -> tuple[Batch, Scalars]:
        """The same rows."""
        del scores, ended, kl_coef
        return rows, {}
