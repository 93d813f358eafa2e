"""A head at work: token ids of whole texts in, what it gives at the last token of each out."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.classification import text_outputs
from jaxllm.objectives.objective import Batch, Params
from jaxllm.sharding.mesh import constrain

_SHORTEST = 32


def outputs_of(
    model: TransformerConfig,
    params: Params,
    rows: Sequence[Sequence[int]],
    context: int,
    batch_size: int,
) -> Iterator[Float32[np.ndarray, " outputs"]]:
    """What the head gives at the last token of each row. The mesh must be set.

    Args:
        model: with a head.
        params: of the model.
        rows: token ids of a text each, `context` at most.
        context: tokens of the longest row.
        batch_size: rows at once.
    """
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        # Few shapes, each compiled once: powers of two up to the context.
        longest = max(_SHORTEST, *map(len, batch))
        length = min(1 << (longest - 1).bit_length(), context)
        tokens = np.zeros((batch_size, length), np.int32)
        lengths = np.ones(batch_size, np.int32)
        for place, row in enumerate(batch):
            tokens[place, : len(row)] = row
            lengths[place] = len(row)
        found = _last_outputs(params, tokens, lengths, model=model)
        yield from np.asarray(found)[: len(batch)]


@partial(jax.jit, static_argnames="model")
def _last_outputs(
    params: Params, tokens: Array, lengths: Array, *, model: TransformerConfig
) -> Float[Array, "batch outputs"]:
    """What the head gives at the last token of each row."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch: Batch = {
        "tokens": tokens,
        "positions": places,
        "segment_ids": (places < lengths[:, None]).astype(jnp.int32),
    }
    outputs, _ = text_outputs(model, params, batch)
    # Whole in every process, each of which reads it.
    return constrain(jnp.take_along_axis(outputs, lengths[:, None, None] - 1, axis=1)[:, 0])
