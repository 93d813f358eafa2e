"""The rollouts of a student that learns of its teacher on texts that it writes itself."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxllm.data.continuations import first_answers, text_beginnings
from jaxllm.data.corpus import Corpus
from jaxllm.data.examples import Examples
from jaxllm.data.prompts import DrawnPrompts, Prompt, Prompts
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
from jaxllm.sharding.processes import is_main
from jaxllm.stages.student import student_of
from jaxllm.stages.training_run import TrainingRun
from jaxllm.tokenizers.tokenizer import Tokenizer
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
    """Where any are: tokens of what it goes on from. Text is cut into pieces, of which these are
    the beginnings, and what is no longer than one is left out; of a conversation it is what comes
    before the first answer, and one that begins with more is left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError("on_policy_fraction: must be from 0 to 1")
        if self.max_prompt < 1:
            raise ValueError("max_prompt: must be at least 1")


class Given(NamedTuple):
    """What a student goes on from."""

    drawn: Callable[[int], Prompt]
    """By number, in the order in which they are drawn."""
    tokenizer: Tokenizer
    places: int
    """Tokens of a sequence at most."""
    stop_ids: tuple[int, ...]
    """Tokens that end one, beside the one that ends a document."""
    share: float
    """Of the sequences that the student writes."""
    scores: dict[str, float]
    """What the summary tells of them."""


def beginnings_of(run: TrainingRun[Any], corpus: Corpus, fields: OnPolicyFields) -> Given:
    """What a student goes on from: pieces of text, or conversations up to their first answer.

    Args:
        run: whose configuration has `WritingFields`.
        corpus: what they are of.
        fields: how long they are.

    Raises:
        UserError: there is nothing to go on from, or too little.
    """
    config, tokenizer = run.config, corpus.tokenizer
    room, longest = config.max_new_tokens, fields.max_prompt
    stop_ids: tuple[int, ...] = ()
    if isinstance(corpus.encoder, Examples):
        examples = corpus.encoder
        # It is learnt, yet whoever asks writes it.
        bos_id = tokenizer.bos_id if examples.config.layout == "bos_separated" else None
        found = [first_answers(store, longest, room, bos_id) for store in corpus.train]
        stop_ids = examples.template.stop_ids
    else:
        found = [text_beginnings(store, longest, room) for store in corpus.train]
    for entry, beginnings in zip(corpus.entries, found, strict=True):
        if not beginnings:
            raise UserError(
                f"config.data.train: {entry.name}: has nothing to go on from: no document fits "
                f"config.distill.max_prompt={longest}; give text that is longer than that, or let "
                "conversations begin with more."
            )
    dropped = sum(beginnings.dropped for beginnings in found)
    if dropped and is_main():
        print(
            f"{dropped:,} documents are left out by config.distill.max_prompt={longest}: texts "
            "that are no longer, and conversations that begin with more",
            file=sys.stderr,
        )
    drawn = DrawnPrompts(Prompts(tuple(found), (), dropped), config.data, config.seed)
    if len(drawn) < run.drawn:
        raise UserError(
            f"config.data: the limits of epochs allow {len(drawn):,} beginnings, and "
            f"{config.steps:,} steps want {run.drawn:,}; give more data, raise the limits, or make "
            "fewer steps."
        )
    scores = {
        "data/train_prompts": float(sum(map(len, found))),
        "data/dropped_prompts": float(dropped),
    }
    share = fields.on_policy_fraction
    return Given(drawn.__getitem__, tokenizer, longest + room, stop_ids, share, scores)


def student_stream(run: TrainingRun[Any], given: Given, model: TransformerConfig) -> Stream:
    """Updates of sequences that the student goes on with, or that go on as they were found.

    Args:
        run: whose configuration has `WritingFields`.
        given: what is gone on from.
        model: the student's.
    """
    config, places = run.config, given.places

    def engine(params: Params) -> Engine:
        written_by = student_of(params)
        return Engine(
            model, written_by, given.tokenizer, context=places, slots=SLOTS, tempered=True
        )

    writer = Writer(
        given.drawn,
        engine,
        given.tokenizer,
        Sampling(config.max_new_tokens, config.temperature, stop=config.sampling().stop),
        given.stop_ids,
        group_size=1,
    )
    rollouts = Rollouts(
        RolloutConfig(),
        PartlyWritten(writer, given.share),
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
