"""The rollouts of a student that learns of its teacher on texts that it writes itself."""

import dataclasses
import functools
from typing import Any

from jaxllm.data.continuations import first_answers, text_beginnings
from jaxllm.data.corpus import Corpus
from jaxllm.data.examples import Examples
from jaxllm.data.prompts import DrawnPrompts
from jaxllm.errors import UserError
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Sampling
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Params
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.imitation import AsTheyAre, PartlyWritten, Unjudged
from jaxllm.rollouts.learner import Learner
from jaxllm.rollouts.source import Rollouts
from jaxllm.rollouts.writer import Writer
from jaxllm.stages.teacher import student_of
from jaxllm.stages.training_run import TrainingRun
from jaxllm.training.loop import Stream

SLOTS = 64
"""Texts that are written at once."""


@dataclasses.dataclass(frozen=True)
class OnPolicyFields:
    """On whose texts a student learns."""

    on_policy_fraction: float = 0.0
    """λ: share of the sequences of an update that the student writes itself, by its parameters of
    then (GKD: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649)."""
    max_prompt: int = 64
    """Where any are: tokens of what it goes on from; of text its own beginning, of a conversation
    what comes before the first answer, and one that begins with more is left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError("on_policy_fraction: must be from 0 to 1")
        if self.max_prompt < 1:
            raise ValueError("max_prompt: must be at least 1")


def student_stream(
    run: TrainingRun[Any], corpus: Corpus, model: TransformerConfig, fields: OnPolicyFields
) -> Stream:
    """Updates of sequences that the student goes on with, or that are found in the corpus.

    Args:
        run: whose configuration has `WritingFields`.
        corpus: what is gone on from.
        model: the student's.
        fields: how much of it.

    Raises:
        UserError: there is nothing to go on from, or too little.
    """
    config, tokenizer = run.config, corpus.tokenizer
    names = [entry.name for entry in corpus.entries]
    room, longest = config.max_new_tokens, fields.max_prompt
    stop_ids: tuple[int, ...] = ()
    if isinstance(corpus.encoder, Examples):
        examples = corpus.encoder
        # It is learnt, yet whoever asks writes it.
        bos_id = tokenizer.bos_id if examples.config.layout == "bos_separated" else None
        prompts = first_answers(corpus.train, names, longest, room, bos_id)
        stop_ids = examples.template.stop_ids
    else:
        prompts = text_beginnings(corpus.train, names, longest, room)
    drawn = DrawnPrompts(prompts, config.data, config.seed)
    if len(drawn) < run.drawn:
        raise UserError(
            f"config.data: the limits of epochs allow {len(drawn):,} beginnings, and "
            f"{config.steps:,} steps want {run.drawn:,}; give more data, raise the limits, or make "
            "fewer steps."
        )
    places = longest + room

    def engine(params: Params) -> Engine:
        written_by = student_of(params)
        return Engine(model, written_by, tokenizer, context=places, slots=SLOTS, tempered=True)

    writer = Writer(
        drawn.__getitem__,
        engine,
        tokenizer,
        Sampling(room, config.temperature, stop=config.sampling().stop),
        stop_ids,
        group_size=1,
    )
    rollouts = Rollouts(
        RolloutConfig(max_prompt=longest),
        PartlyWritten(writer, fields.on_policy_fraction),
        Unjudged(),
        Learner(model, None, has_values=False, reference=None, needs_old=False, temperature=1.0),
        AsTheyAre(),
        mesh=run.mesh,
        batch_size=config.batch_size,
        parts=config.micro_batches,
        places=places,
        seed=config.seed,
        writing=functools.partial(run.ledger.spending, "rollout"),
    )
    return Stream(rollouts, places, rollouts.scalars, rollouts.prepare, rollouts.memory)
