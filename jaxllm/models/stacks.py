"""Cutting the layers of a model into other stacks, which compute the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.models.config import StackConfig, TransformerConfig


def cut(stacks: Sequence[StackConfig], layers: int) -> tuple[StackConfig, ...]:
    """Stacks of the same layers, of which the first `layers` share none with the others."""
    found: list[StackConfig] = []
    for stack in stacks:
        size = len(stack.unit)
        before = min(max(layers, 0), stack.repeats * size)
        layers -= stack.repeats * size
        repeats, rest = divmod(before, size)
        found.append(StackConfig(repeats, stack.unit))
        if rest:  # the cut goes through a unit
            found += [StackConfig(1, stack.unit[:rest]), StackConfig(1, stack.unit[rest:])]
            repeats += 1
        found.append(StackConfig(stack.repeats - repeats, stack.unit))
    return tuple(stack for stack in found if stack.repeats)


def last_stacks(stacks: Sequence[StackConfig], layers: int) -> range:
    """The numbers of the stacks that hold the last `layers` layers, which share none with others'.

    The model was cut there.
    """
    first = len(stacks)
    while layers > 0:
        first -= 1
        layers -= stacks[first].repeats * len(stacks[first].unit)
    assert layers == 0, "the stacks are not cut there"
    return range(first, len(stacks))


def unrolled(config: TransformerConfig) -> TransformerConfig:
    """The model as one stack that is not repeated.

    A scanned layer reads its weights out of the stack. Where the compiler makes a copy of them for
    that, as on a CPU, decoding a token would copy the whole model.
    """
    return dataclasses.replace(config, stacks=(StackConfig(1, config.unrolled),))


def restacked(
    params: trees.Tree, stacks: Sequence[StackConfig], wanted: Sequence[StackConfig]
) -> dict:
    """The parameters of a model whose layers lie in `stacks` as those of the same layers in
    `wanted`. Where only some layers have any, the others have none then too."""
    layers = _places(stacks)
    found = {name: leaf for name, leaf in params.items() if not name.startswith("stack_")}
    first = 0
    for index, stack in enumerate(wanted):
        size = len(stack.unit)
        end = first + stack.repeats * size
        own = {}
        for number in range(size):
            same = layers[first + number : end : size]
            if all(layer in params.get(stack, {}) for stack, layer, _ in same):
                own[f"layer_{number}"] = _stacked(params, same)
        if own:
            found[f"stack_{index}"] = own
        first = end
    return found


def layer_of(tree: trees.Tree, stacks: Sequence[StackConfig], number: int) -> Any:
    """What a tree that is laid out as the parameters of `stacks` has of one layer, counted from
    0, without the leading axis."""
    stack, layer, repeat = _places(stacks)[number]
    return jax.tree.map(lambda leaf: leaf[repeat], tree[stack][layer])


def _places(stacks: Sequence[StackConfig]) -> list[tuple[str, str, int]]:
    """Where each layer stands: its stack, its place in the unit and its repeat."""
    return [
        (f"stack_{index}", f"layer_{number}", repeat)
        for index, stack in enumerate(stacks)
        for repeat in range(stack.repeats)
        for number in range(len(stack.unit))
    ]


def _stacked(params: trees.Tree, layers: Sequence[tuple[str, str, int]]) -> dict:
    """Layers of equal kind, each named by its stack, its place in the unit and its repeat, along a
    leading axis."""
    runs: list[tuple[str, str, int, int]] = []
    for stack, layer, repeat in layers:
        if runs and runs[-1][:2] == (stack, layer) and runs[-1][3] == repeat:
            runs[-1] = (stack, layer, runs[-1][2], repeat + 1)
        else:
            runs.append((stack, layer, repeat, repeat + 1))
    parts = [
        jax.tree.map(lambda leaf, b=begin, e=end: leaf[b:e], params[stack][layer])
        for stack, layer, begin, end in runs
    ]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *p: jnp.concatenate(p), *parts)
