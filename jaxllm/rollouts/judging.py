"""What the responses of a policy are worth: rewards, and what is made of a missing end."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxllm.data.prompts import Prompt
from jaxllm.data.rankings import ResponseIds
from jaxllm.errors import UserError
from jaxllm.inference.reward_model import RewardModel
from jaxllm.rewards.reward import OneByOne
from jaxllm.rewards.specification import parse_rewards
from jaxllm.rewards.weighted import Rewards
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.responses import Response
from jaxllm.sharding.processes import from_main

MODEL = "reward_model"
"""What a reward model is called among the rewards."""

Scores = Float64[np.ndarray, " responses"]


class Judged(NamedTuple):
    """What responses are worth."""

    scores: Scores
    by_name: Mapping[str, Scores]
    """The values of each reward, without its weight."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges responses; the mesh must be set, and several processes judge together."""

    config: RolloutConfig
    rewards: Rewards
    max_new_tokens: int
    given: "list[float]" = dataclasses.field(default_factory=list)
    """What the reward model gives the responses under judgement."""
    model: RewardModel | None = None
    reads_ids: bool = False
    """Whether the reward model has the policy's tokenizer and template, and so reads the very
    tokens of a response; else it is shown the text in its own."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards."""
        return tuple(part.name for part in self.rewards.parts)

    def __call__(self, asked: Sequence[Prompt], written: Sequence[Response]) -> Judged:
        """What each response to the prompt at its place is worth.

        Raises:
            UserError: a reward fails; the message names it and the prompt.
        """
        if self.model:
            self.given[:] = self._of_model(self.model, asked, written)

        def told() -> tuple[list[float], dict[str, list[float]]]:
            found = self.rewards(
                [prompt.text for prompt in asked],
                [response.text for response in written],
                [prompt.record for prompt in asked],
                [f"response {number} of {len(written)}" for number in range(1, len(written) + 1)],
            )
            by_name = {name: values.tolist() for name, values in found.by_name.items()}
            return found.total.tolist(), by_name

        total, by_name = from_main(told)  # a user's function need not say the same twice
        scores = np.array(total) + self._too_long(written)
        return Judged(
            self._with_ends(scores, written),
            {name: np.array(values) for name, values in by_name.items()},
        )

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Checks that the record of each prompt has what verifiers need, before any is answered.

        Raises:
            UserError: one has not; the message names the reward and the prompt.
        """
        listed = list(prompts)

        def checked() -> None:
            texts, records = [one.text for one in listed], [one.record for one in listed]
            places = [f"prompt {number} of {len(listed)}" for number in range(1, len(listed) + 1)]
            for part in self.rewards.parts:
                if isinstance(part.function, OneByOne):
                    part(texts, [""] * len(listed), records, places)

        from_main(checked)

    def _of_model(
        self, model: RewardModel, asked: Sequence[Prompt], written: Sequence[Response]
    ) -> list[float]:
        if not self.reads_ids:
            return model([prompt.messages for prompt in asked], [each.text for each in written])
        pairs = zip(asked, written, strict=True)
        return model.of_ids([ResponseIds(prompt.ids, response.ids) for prompt, response in pairs])

    def _too_long(self, written: Sequence[Response]) -> Scores:
        """What is taken away from responses that come near the limit."""
        buffer = self.config.overlong_buffer
        lengths = np.array([len(response.ids) for response in written])
        if not buffer:
            return np.zeros(len(written))
        return -np.clip((lengths - (self.max_new_tokens - buffer)) / buffer, 0, 1)

    def _with_ends(self, scores: Scores, written: Sequence[Response]) -> Scores:
        missing = np.array([not response.ended for response in written])
        penalty = self.config.missing_end_penalty
        if self.config.missing_end == "replace":
            return np.where(missing, -penalty, scores)
        if self.config.missing_end == "subtract":
            return scores - penalty * missing
        return scores


def make_judge(
    config: RolloutConfig,
    spec: str,
    max_new_tokens: int,
    model: RewardModel | None,
    reads_ids: bool,
    has_model: bool,
) -> Judge:
    """The judge by the rewards of a comma string, of which a reward model may be one.

    Args:
        config: what is made of a missing end.
        spec: the comma string; empty: the reward model alone.
        max_new_tokens: of a response at most.
        model: the reward model, if it is loaded.
        reads_ids: whether it has the policy's tokenizer and template.
        has_model: whether there is one.

    Raises:
        UserError: as `parse_rewards`, or the reward model is none of the rewards.
    """
    given: list[float] = []
    models = {MODEL: lambda prompts, responses, records: given} if has_model else {}
    rewards = parse_rewards(spec or MODEL, "rewards", models)
    if has_model and not any(part.name == MODEL for part in rewards.parts):
        raise UserError(
            f"config.rewards: {spec} does not ask the reward model of config.reward.init; add "
            f"{MODEL}, as in {MODEL},{spec}, or leave that out."
        )
    return Judge(config, rewards, max_new_tokens, given, model, reads_ids)
