"""What a forward pass can be asked for beside its result: hidden states behind each layer, and the
queries and keys of its attention.

    output, recorded = Transformer(config).apply(..., mutable=[HIDDEN])
    hidden = of_layer(config, recorded, HIDDEN, 2)["hidden"]

A pass that is not asked for them computes and keeps nothing more.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxllm.models.config import TransformerConfig
from jaxllm.models.stacks import layer_of

HIDDEN = "hidden"
"""Collection of the residual stream behind each layer, `hidden` [batch, seq, embed]."""
ATTENTION = "attention"
"""Collection of the `queries` [batch, seq, heads, head_dim] and `keys` [batch, seq, kv_heads,
head_dim] of each layer, as they are multiplied."""
COLLECTIONS = (HIDDEN, ATTENTION)


def record(module: nn.Module, collection: str, **values: Float[Array, "..."]) -> None:
    """Gives values out of a layer, where they are asked for."""
    for name, value in values.items():
        module.sow(collection, name, value, reduce_fn=lambda before, now: now, init_fn=lambda: None)


def of_layer(
    config: TransformerConfig, recorded: Mapping[str, Any], collection: str, number: int
) -> dict[str, Float[Array, "..."]]:
    """What a pass recorded of one layer, counted from 0."""
    found = layer_of(recorded[collection], config.stacks, number)
    return found["attention"] if collection == ATTENTION else found
