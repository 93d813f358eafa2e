"""The objectives of pretraining by name, and what each asks of the model."""

import dataclasses

import jax

from jaxllm import config as configuration
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.masked_word import MaskedWordConfig, masked_word
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.objective import Objective
from jaxllm.objectives.prefix_lm import PrefixLMConfig, prefix_lm
from jaxllm.ops.attention import check_backend
from jaxllm.tokenizers.tokenizer import Tokenizer

KINDS = ("next_token", "masked_word", "prefix_lm")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(MaskedWordConfig, PrefixLMConfig):
    """What the model learns to predict."""

    kind: str = "next_token"
    """What is predicted: `next_token`; `masked_word` (hidden tokens, from both sides; with
    `model.causal=False`); `prefix_lm` (what follows a prefix that is seen both ways):
    docs/objectives.md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}; was {self.kind!r}")

    @property
    def every_token(self) -> bool:
        """Whether every token is predicted, so that the losses add up to that of the text."""
        return self.kind == "next_token"

    @property
    def prompt_is_prefix(self) -> bool:
        """Whether the model has learnt to see a prompt both ways."""
        return self.kind == "prefix_lm"


def make_objective(
    model: TransformerConfig, config: ObjectiveConfig, tokenizer: Tokenizer
) -> Objective:
    """The objective of `config.kind`.

    Raises:
        UserError: the tokenizer lacks what it needs.
    """
    if config.kind == "masked_word":
        return masked_word(model, config, tokenizer)
    if config.kind == "prefix_lm":
        return prefix_lm(model, config)
    return next_token(model, config)


def check_model(model: TransformerConfig, config: ObjectiveConfig) -> None:
    """Checks, before anything slow, that the objective can be computed and does not leak.

    Raises:
        UserError: it sees what it has to predict, or never sees what it could; or the attention
            backend cannot compute it.
    """
    if config.kind == "masked_word" and model.causal:
        raise UserError(
            "config.objective.kind: masked_word fills in tokens from both sides, and this model "
            "sees one side only; give --config.model.causal=False, or in config.init a run that "
            "had it."
        )
    if config.kind != "masked_word" and not model.causal:
        raise UserError(
            f"config.objective.kind: {config.kind} would be shown the tokens that it has to "
            "predict, because this model sees both ways (config.model.causal=False, or that of "
            "config.init); give --config.objective.kind=masked_word, or a causal model."
        )
    if config.kind != "prefix_lm":
        return
    for attention in {layer.attention for layer in model.unrolled}:
        check_backend(
            attention.backend,
            causal=attention.causal,
            window=attention.window,
            soft_cap=attention.soft_cap,
            prefix=True,
            head_dim=attention.head_dim,
            value_dim=attention.value_dim,
            platform=jax.default_backend(),
        )


def objective_config_of(run: RunDirectory) -> ObjectiveConfig:
    """The objective that a run recorded."""
    return configuration.from_dict(ObjectiveConfig, run.config()["objective"], "objective")
