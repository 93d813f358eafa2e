"""What a run trains that begins from another model, and whether it can."""

import dataclasses
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxllm import trees
from jaxllm.checkpoints.load import model_config_of, tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.config import DataConfig
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture, completed
from jaxllm.models.lora import pair_shapes
from jaxllm.models.quantised import is_held
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.stages.fields import ModelTrainingFields
from jaxllm.stages.fit import check_patterns
from jaxllm.tokenizers.tokenizer import Tokenizer

HOW_COMPUTED = (
    "dtype",
    "reduction_dtype",
    "remat",
    "attention",
    "dropout",
    "embedding_dropout",
    # How its layers lie in stacks, and what reads it: parameters are cut, and a head left out.
    "top_layers",
    "head",
)
"""Fields of the model that say how it is computed rather than what it is."""
# Those that say what it is, but change no parameter's shape.
_SHAPELESS = (
    "rope_theta",
    "rope_local_theta",
    "rope_scaling",
    "window",
    "causal",
    "attention_soft_cap",
    "logit_soft_cap",
    "load_balance_loss",
    "router_z_loss",
    "param_dtype",
)


def continued_model(
    given: ModelConfig, recorded: ModelConfig, place: str = "config.init"
) -> ModelConfig:
    """The recorded model, computed as configured, and with what is given that its parameters
    allow to change; given is what differs from the default.

    Args:
        given: what is configured.
        recorded: the model as it was recorded or published.
        place: where that was, for messages.

    Raises:
        UserError: another field is given, and differs from the recorded one.
    """
    learned = completed(recorded).positions == "learned"
    shapeless = _SHAPELESS if learned else (*_SHAPELESS, "max_positions")
    changed = {}
    for field in dataclasses.fields(ModelConfig):
        name, default = field.name, getattr(ModelConfig(), field.name)
        value, before = getattr(given, name), getattr(recorded, name)
        if name in HOW_COMPUTED or (name in shapeless and value != default):
            changed[name] = value
        elif value not in (default, before):
            raise UserError(
                f"config.model.{name}: was given {value!r}, and the parameters of {place} are "
                f"of {before!r}; leave it out, or give the same (or the same preset of --config)."
            )
    return dataclasses.replace(recorded, **changed)


def check_init(init: str, made_by: str) -> None:
    """Checks that a run is told what it begins from.

    Raises:
        UserError: it is not; the message names a configuration that makes such a model.
    """
    if not init:
        raise UserError(
            "config.init: give the run directory or Hugging Face folder of a trained model, as "
            f"one of {made_by}."
        )


def model_to_continue(
    init: str, given: ModelConfig, directory: RunDirectory
) -> tuple[ModelConfig, str]:
    """The model of a run that begins from another, or from published weights, and the path of its
    tokenizer.

    Once begun, the run needs them no more.

    Raises:
        UserError: there is no such model, or `given` asks for another.
    """
    begun = directory.config_path.exists()
    recorded = model_config_of(directory.path if begun else init)
    path = str(tokenizer_path(init))
    if begun:
        path = directory.config().get("tokenizer", {}).get("path", path)
    print(f"model and tokenizer are those of {init}", file=sys.stderr)
    return continued_model(given, recorded), path


def check_writer(
    config: ModelTrainingFields,
    data: DataConfig,
    tokenizer: Tokenizer,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Checks, before anything slow, that the model writes, and can be trained so on such rows;
    `beside` has the shapes of what is trained beside it.

    Raises:
        UserError: it cannot.
    """
    model = architecture(config.model, tokenizer.vocab_size)
    if not model.causal:
        raise UserError(
            "config.init: its model sees both ways (config.model.causal=False), and cannot write; "
            "give one that does."
        )
    check_length(model, data.seq_len, "config.data.seq_len")
    check_patterns(config, with_pairs(config, param_shapes(model)) | dict(beside))


def with_pairs(config: ModelTrainingFields, shapes: dict[str, Any]) -> dict[str, Any]:
    """The shapes of a model with those of the pairs beside its matrices, if there are to be any.

    Raises:
        UserError: `lora.pattern` matches none, or what is trained is to be held in fewer bits.
    """
    if not config.lora.rank:
        return shapes
    for path, _ in trees.leaves_with_paths(trees.divide(shapes, config.trained_of_model)[0]):
        if is_held(path, config.lora.base):
            raise UserError(
                f"config.lora.base: {path} is to be trained (config.train.trainable), and cannot "
                f"be held as {config.lora.base}; leave one of both out."
            )
    return trees.merge(shapes, pair_shapes(shapes, config.lora))
