"""The model of a run that begins from another: what may differ from what it begins with."""

import dataclasses

from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import completed

# Fields of the model that say how it is computed rather than what it is,
_COMPUTED = (
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
# and those that say what it is, but change no parameter's shape.
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


def continued_model(given: ModelConfig, recorded: ModelConfig) -> ModelConfig:
    """The recorded model, computed as configured, and with what is given that its parameters
    allow to change; given is what differs from the default.

    Raises:
        UserError: another field is given, and differs from the recorded one.
    """
    learned = completed(recorded).positions == "learned"
    shapeless = _SHAPELESS if learned else (*_SHAPELESS, "max_positions")
    changed = {}
    for field in dataclasses.fields(ModelConfig):
        name, default = field.name, getattr(ModelConfig(), field.name)
        value, before = getattr(given, name), getattr(recorded, name)
        if name in _COMPUTED or (name in shapeless and value != default):
            changed[name] = value
        elif value not in (default, before):
            raise UserError(
                f"config.model.{name}: was given {value!r}, and the parameters of config.init are "
                f"of {before!r}; leave it out, or give the same (or the same preset of --config)."
            )
    return dataclasses.replace(recorded, **changed)
