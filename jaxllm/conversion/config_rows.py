"""Rows of a family's table of configuration: fields of a published `config.json`, and ours.

A row is read in both directions: their fields to ours when weights are imported, ours to theirs
when they are exported. What it cannot take over it refuses, by name, with a `ValueError`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from jaxllm.conversion import typed
from jaxllm.conversion.typed import Theirs
from jaxllm.models.config import ModelConfig

# Names of activations there; of several for one of ours, the first is written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_KINDS = {"sliding_attention": "local", "full_attention": "global"}


@dataclasses.dataclass(frozen=True)
class Row:
    """Fields of theirs, and those of `ModelConfig` that say the same."""

    theirs: str
    """The name of their field; of several, of the one that says most."""
    ours: tuple[str, ...]
    """The fields of `ModelConfig`; none where theirs may have one value only."""
    read: Callable[[Theirs], dict[str, Any]]
    """Values of `ours`; a ValueError begins with the name of their field."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Their fields, of a completed configuration; a ValueError begins with the name of ours."""


def value(
    theirs: str,
    ours: str,
    default: int | float | bool | None,
    *,
    also: str = "",
    null: bool = False,
    zero: bool = False,
    most: int = typed.LARGEST,
) -> Row:
    """A number or switch that is the same on both sides.

    Args:
        theirs: the name of their field.
        ours: the name of ours.
        default: what their implementation takes where the field is missing.
        also: another name that their field goes by.
        null: whether theirs may be null, which is our 0.
        zero: whether 0 is a value like others, where ours has no other meaning for it.
        most: the largest integer that is taken.
    """
    kind = type(getattr(ModelConfig, ours))
    options: dict[type, tuple[Callable[..., Any], dict[str, Any]]] = {
        int: (typed.integer, {"most": most}),
        float: (typed.number, {"zero": zero}),
        bool: (typed.switch, {}),
    }
    checked, limits = options[kind]

    def read(config: Theirs) -> dict[str, Any]:
        if null and config.get(theirs, config.get(also, default)) is None:
            return {ours: kind(0)}
        return {ours: checked(config, theirs, default, also=also, **limits)}

    def write(config: ModelConfig) -> dict[str, Any]:
        ours_is = getattr(config, ours)
        return {theirs: None if null and not ours_is else ours_is}

    return Row(theirs, (ours,), read, write)


def fixed(theirs: str, *allowed: Any) -> Row:
    """A field that may have these values only, which make no difference; the first is the
    default, and is written unless it is None."""

    def read(config: Theirs) -> dict[str, Any]:
        found = config.get(theirs, allowed[0])
        if found not in allowed:
            raise ValueError(
                f"{theirs}: {typed.shown(found)} is not supported; only {allowed[-1]!r} is"
            )
        return {}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {} if allowed[0] is None else {theirs: allowed[0]}

    return Row(theirs, (), read, write)


def activation(theirs: str, default: str) -> Row:
    """The activation of the MLP."""

    def read(config: Theirs) -> dict[str, Any]:
        return {"activation": _ACTIVATIONS[typed.choice(config, theirs, default, _ACTIVATIONS)]}

    def write(config: ModelConfig) -> dict[str, Any]:
        names = (default, *_ACTIVATIONS)
        return {theirs: next(n for n in names if _ACTIVATIONS[n] == config.activation)}

    return Row(theirs, ("activation",), read, write)


def query_scale(default: int) -> Row:
    """`query_pre_attn_scalar`, one over the square of the attention scale."""
    theirs = "query_pre_attn_scalar"

    def read(config: Theirs) -> dict[str, Any]:
        return {"attention_scale": typed.number(config, theirs, default) ** -0.5}

    def write(config: ModelConfig) -> dict[str, Any]:
        whole = round(config.attention_scale**-2)
        if abs(whole**-0.5 - config.attention_scale) > 1e-9 * config.attention_scale:
            raise ValueError(
                f"attention_scale: is {config.attention_scale}, which is 1/√n of no whole n"
            )
        return {theirs: whole}

    return Row(theirs, ("attention_scale",), read, write)


def window_of_all(default: int | None, switch: str = "") -> Row:
    """`sliding_window` of every layer, or null, or turned off by `switch`; a list of `layer_types`
    may say the same, and nothing else."""

    def read(config: Theirs) -> dict[str, Any]:
        found: dict[str, Any]
        off = bool(switch) and not typed.switch(config, switch, False)
        if off or config.get("sliding_window", default) is None:
            kind, found = "full_attention", {"pattern": "global"}
        else:
            window = typed.integer(config, "sliding_window", default)
            kind, found = "sliding_attention", {"pattern": "local", "window": window}
        listed = config.get("layer_types")
        if listed is not None and (not isinstance(listed, list) or listed != [kind] * len(listed)):
            raise ValueError(
                f"layer_types: {typed.shown(listed)} is not supported; by the other fields every "
                f"layer is {kind}"
            )
        return found

    def write(config: ModelConfig) -> dict[str, Any]:
        if len(set(config.pattern.split(","))) > 1:
            raise ValueError(f"pattern: is {config.pattern!r}, of layers that are not alike")
        fields = {"sliding_window": config.window or None}  # 0 where layers are global
        return fields | ({switch: config.window > 0} if switch else {})

    return Row("sliding_window", ("pattern", "window"), read, write)


def window_by_layer(
    usual: tuple[str, ...],
    default: int,
    unlisted: Callable[[Theirs, int], str],
    layers: int,
    switch: str = "",
) -> Row:
    """`layer_types`, a list of the kinds of layers, and the `sliding_window` of some.

    Args:
        usual: the pattern of the family, which is told where it fits.
        default: the window where it is missing.
        unlisted: the kind of a layer, `local` or `global`, where there is no list.
        layers: number of layers where it is missing.
        switch: a field that turns all windows off.
    """

    def read(config: Theirs) -> dict[str, Any]:
        count = typed.integer(config, "num_hidden_layers", layers, most=typed.MOST_PARTS)
        listed = config.get("layer_types")
        if listed is None:
            kinds = tuple(unlisted(config, number) for number in range(count))
        elif not _tells_each(listed, count):
            known = " or ".join(_KINDS)
            raise ValueError(
                f"layer_types: must say {known} of each of {count} layers, and is "
                f"{typed.shown(listed)}"
            )
        else:
            kinds = tuple(_KINDS[kind] for kind in listed)
        pattern = _pattern(kinds, usual)
        if "local" not in pattern:
            return {"pattern": ",".join(pattern)}
        if switch and not typed.switch(config, switch, False):
            raise ValueError(f"{switch}: is off, and layer_types has sliding_attention")
        window = typed.integer(config, "sliding_window", default)
        return {"pattern": ",".join(pattern), "window": window}

    def write(config: ModelConfig) -> dict[str, Any]:
        pattern = config.pattern.split(",")
        kinds = [pattern[number % len(pattern)] for number in range(config.layers)]
        if "local" in kinds and not config.window:
            raise ValueError("window: is 0, and some layers are local")
        names = {ours: theirs for theirs, ours in _KINDS.items()}
        fields = {
            "layer_types": [names[kind] for kind in kinds],
            "sliding_window": config.window or None,
        }
        return fields | ({switch: "local" in kinds} if switch else {})

    return Row("layer_types", ("pattern", "window"), read, write)


def _tells_each(listed: Any, count: int) -> bool:
    """Whether `listed` says the kind of each of `count` layers."""
    whole = isinstance(listed, list) and len(listed) == count
    return whole and all(isinstance(kind, str) and kind in _KINDS for kind in listed)


def _pattern(kinds: tuple[str, ...], usual: tuple[str, ...]) -> tuple[str, ...]:
    """What repeated makes `kinds`: the usual pattern, if it does, else the shortest."""
    count = len(kinds)
    shortest = (kinds[:length] for length in range(1, count + 1))
    fitting = (
        pattern
        for pattern in itertools.chain([usual], shortest)
        if (pattern * -(-count // len(pattern)))[:count] == kinds
    )
    return next(fitting)
