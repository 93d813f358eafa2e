"""Cutting the layers of a model into other stacks, which compute the same."""

import dataclasses

import jax

from jaxllm import trees
from jaxllm.models.config import StackConfig, TransformerConfig


def unrolled(config: TransformerConfig) -> TransformerConfig:
    """The model as one stack that is not repeated.

    A scanned layer reads its weights out of the stack. Where the compiler makes a copy of them for
    that, as on a CPU, decoding a token would copy the whole model.
    """
    return dataclasses.replace(config, stacks=(StackConfig(1, config.unrolled),))


def unrolled_params(config: TransformerConfig, params: trees.Tree) -> dict:
    """The parameters of `config` as those of `unrolled(config)`."""
    layers = [
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat][None], params[f"stack_{index}"][name])
        for index, stack in enumerate(config.stacks)
        for repeat in range(stack.repeats)
        for name in (f"layer_{number}" for number in range(len(stack.unit)))
    ]
    others = {name: leaf for name, leaf in params.items() if not name.startswith("stack_")}
    return others | {"stack_0": {f"layer_{number}": layer for number, layer in enumerate(layers)}}
