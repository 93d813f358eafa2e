"""The objectives of pretraining by name, and what each asks of the model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxllm import config as configuration
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import is_published
from jaxllm.errors import UserError
from jaxllm.models.attention import check_attention
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.masked_word import masked_word
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.objective import Objective
from jaxllm.objectives.prefix_lm import prefix_lm
from jaxllm.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(CrossEntropyConfig):
    """What the model learns to predict."""

    kind: str = "next_token"
    """What is predicted: `next_token`; `masked_word` (hidden tokens, from both sides; with
    `model.causal=False`); `prefix_lm` (what follows a prefix that is seen both ways):
    docs/objectives.md."""
    mask_fraction: float = 0.15
    """Share of the tokens of a row that are chosen to be predicted; of `masked_word` alone."""
    prefix_fraction: float = 0.5
    """Share of each document's tokens in a row that all of it sees and that are not predicted,
    rounded down; of `prefix_lm` alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}; was {self.kind!r}")
        if not 0 < self.mask_fraction <= 1:
            raise ValueError("mask_fraction: must be in (0, 1]")
        if not 0 <= self.prefix_fraction < 1:
            raise ValueError("prefix_fraction: must be in [0, 1)")
        for kind, option in ((name, kind.option) for name, kind in KINDS.items() if kind.option):
            default = getattr(type(self), option)
            if kind != self.kind and getattr(self, option) != default:
                raise ValueError(
                    f"{option}: belongs to the kind {kind}, and this is {self.kind}; leave it at "
                    f"{default}"
                )


@dataclasses.dataclass(frozen=True)
class Kind:
    """An objective that `objective.kind` names, and what it asks of others."""

    make: Callable[[TransformerConfig, ObjectiveConfig, Tokenizer], Objective]
    option: str = ""
    """The field of `ObjectiveConfig` that it alone reads."""
    predicted: Callable[[ObjectiveConfig], float] = lambda config: 1.0
    """The share of places whose token is predicted."""
    sees_both_ways: bool = False
    """Whether the model sees both sides of what it predicts, rather than only what came before."""
    every_token: bool = False
    """Whether every token is predicted, so that the losses add up to that of the text."""
    prompt_is_prefix: bool = False
    """Whether the beginning is seen both ways, in training a prefix, in writing the prompt."""
    needs_mask: bool = False
    """Whether the tokenizer must have a mask."""


KINDS = {
    "next_token": Kind(lambda model, config, _: next_token(model, config), every_token=True),
    "masked_word": Kind(
        lambda model, config, tokenizer: masked_word(
            model, config, tokenizer, config.mask_fraction
        ),
        option="mask_fraction",
        predicted=lambda config: config.mask_fraction,
        sees_both_ways=True,
        needs_mask=True,
    ),
    "prefix_lm": Kind(
        lambda model, config, _: prefix_lm(model, config, config.prefix_fraction),
        option="prefix_fraction",
        predicted=lambda config: 1 - config.prefix_fraction,
        prompt_is_prefix=True,
    ),
}


def make_objective(
    model: TransformerConfig, config: ObjectiveConfig, tokenizer: Tokenizer
) -> Objective:
    """The objective of `config.kind`.

    Raises:
        UserError: the tokenizer lacks what it needs.
    """
    return KINDS[config.kind].make(model, config, tokenizer)


def check_model(model: TransformerConfig, config: ObjectiveConfig) -> None:
    """Checks, before anything slow, that the objective can be computed and does not leak.

    Raises:
        UserError: it sees what it has to predict, or never sees what it could; or the attention
            backend cannot compute it.
    """
    kind = KINDS[config.kind]
    if kind.sees_both_ways and model.causal:
        raise UserError(
            f"config.objective.kind: {config.kind} fills in tokens from both sides, and this model "
            "sees one side only; give --config.model.causal=False."
        )
    if not kind.sees_both_ways and not model.causal:
        others = (name for name, other in KINDS.items() if other.sees_both_ways)
        raise UserError(
            f"config.objective.kind: {config.kind} would be shown the tokens that it has to "
            "predict, because this model sees both ways (config.model.causal=False, or that of "
            f"config.init); give --config.objective.kind={' or '.join(others)}, or a causal model."
        )
    if not kind.prompt_is_prefix:
        return
    for attention in {layer.attention for layer in model.unrolled}:
        check_attention(attention, model.dtypes.compute, prefix=True)


def objective_config_of(path: str | Path) -> ObjectiveConfig:
    """The objective that the run at `path` recorded; of published weights, the next token.

    Raises:
        UserError: there is neither.
    """
    if is_published(path):
        return ObjectiveConfig()
    recorded = RunDirectory(path).config().get("objective", {})  # an imported run has none
    return configuration.from_dict(ObjectiveConfig, recorded, "objective")
