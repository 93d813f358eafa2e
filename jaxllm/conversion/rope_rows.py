"""Rows for rotary positions: `rope_theta` with `rope_scaling`, or, newer, `rope_parameters`."""

import dataclasses
from typing import Any

from jaxllm.conversion import typed
from jaxllm.conversion.config_rows import Row
from jaxllm.conversion.typed import Theirs
from jaxllm.models.config import ModelConfig
from jaxllm.ops.rotary import RopeScaling

# Our kinds by theirs, with our name of each parameter by theirs.
_LENGTHS = {"factor": "factor", "original_max_position_embeddings": "original_length"}
_SCALINGS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "llama3": (
        "llama3",
        _LENGTHS | {"low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
    ),
    "yarn": (
        "yarn",
        _LENGTHS | {name: name for name in ("beta_fast", "beta_slow", "attention_factor")},
    ),
}
# Parameters that are no part of these kinds make no difference at these values.
_HARMLESS = {"truncate": True, "partial_rotary_factor": 1.0}


def rope(theta: float, positions: int) -> Row:
    """One base and scaling for all layers.

    Args:
        theta: the base where it is missing.
        positions: `max_position_embeddings` where it is missing.
    """

    def read(config: Theirs) -> dict[str, Any]:
        field = "rope_scaling" if typed.group(config, "rope_scaling") else "rope_parameters"
        parameters = typed.group(config, field)
        base = _base(parameters, field, config, "rope_theta", theta)
        return {"rope_theta": base, "rope_scaling": _scaling(parameters, config, positions, field)}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"rope_theta": config.rope_theta, "rope_scaling": _written(config.rope_scaling)}

    return Row("rope_theta", ("rope_theta", "rope_scaling"), read, write)


def rope_by_kind(theta: float, local_theta: float, positions: int) -> Row:
    """A base of its own for layers with a window, which are never scaled."""

    def read(config: Theirs) -> dict[str, Any]:
        both = typed.group(config, "rope_parameters")
        if not set(both) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"rope_parameters: must tell of each kind of layer, and is {typed.shown(both)}"
            )
        local = typed.group(both, "sliding_attention", within="rope_parameters.")
        local_field = "rope_parameters.sliding_attention"
        if _scaling(local, config, positions, local_field) != RopeScaling():
            raise ValueError(f"{local_field}: scaling is not supported there")
        old = typed.group(config, "rope_scaling")
        parameters = typed.group(both, "full_attention", within="rope_parameters.") | old
        field = "rope_scaling" if old else "rope_parameters.full_attention"
        return {
            "rope_theta": _base(parameters, field, config, "rope_theta", theta),
            "rope_local_theta": _base(
                local, local_field, config, "rope_local_base_freq", local_theta
            ),
            "rope_scaling": _scaling(parameters, config, positions, field),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        return {
            "rope_theta": config.rope_theta,
            "rope_local_base_freq": config.rope_local_theta,
            "rope_scaling": _written(config.rope_scaling),
        }

    ours = ("rope_theta", "rope_local_theta", "rope_scaling")
    return Row("rope_theta", ours, read, write)


def _base(parameters: Theirs, field: str, config: Theirs, name: str, default: float) -> float:
    if "rope_theta" in parameters:
        return typed.number(parameters, "rope_theta", None, within=f"{field}.")
    return typed.number(config, name, default)


def _scaling(parameters: Theirs, config: Theirs, positions: int, field: str) -> RopeScaling:
    within = f"{field}."
    kind = typed.choice(parameters, "rope_type", "default", _SCALINGS, also="type", within=within)
    ours, names = _SCALINGS[kind]
    known_anywhere = {name for _, some in _SCALINGS.values() for name in some}
    for name, found in parameters.items():
        known_here = name in known_anywhere or name in ("rope_type", "type", "rope_theta")
        if not known_here and found is not None and found != _HARMLESS.get(name):
            raise ValueError(f"{within}{name}: {typed.shown(found)} is not supported")
    given: dict[str, Any] = {}
    if "original_max_position_embeddings" in names:
        given["original_length"] = typed.integer(config, "max_position_embeddings", positions)
    for name, our_name in names.items():
        if parameters.get(name) is not None:
            whole = type(getattr(RopeScaling, our_name)) is int
            checked = typed.integer if whole else typed.number
            given[our_name] = checked(parameters, name, None, within=within)
    if "factor" in names and "factor" not in given:
        raise ValueError(f"{within}factor: is missing, and {kind} needs it")
    if given.get("factor") == 1 and not given.get("attention_factor"):
        return RopeScaling()
    try:
        return RopeScaling(ours, **given)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _written(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling == RopeScaling():
        return None
    theirs = next(name for name, (ours, _) in _SCALINGS.items() if ours == scaling.kind)
    ours = dataclasses.asdict(scaling)
    told = {name: ours[our_name] for name, our_name in _SCALINGS[theirs][1].items()}
    # 0 is our "by factor", which there is told by saying nothing.
    return {"rope_type": theirs} | {name: v for name, v in told.items() if v}
