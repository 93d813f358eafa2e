"""What layers keep of earlier tokens for decoding: preallocated slots, written in place.

Position p of a row is kept in slot p mod the number of slots. A layer that sees everything has a
slot for each position; one that sees a window has no more than the window needs, and what falls out
of it is overwritten.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxllm.models.config import AttentionConfig, LatentAttentionConfig, TransformerConfig
from jaxllm.sharding.mesh import BATCH_AXES, constrain

# Up to so many rows, a CPU writes each by an instruction of its own: XLA makes a loop of a scatter
# there, and a decoding step of 16 rows takes a fifth longer.
_ROWS_APART = 32


class KeyValue(NamedTuple):
    """Keys and values of one layer. Heads lead, so that a head's keys lie side by side: products
    with them are what decoding spends its time on beside the weights."""

    key: Float[Array, "... kv_heads slots head_dim"]
    value: Float[Array, "... kv_heads slots head_dim"]


class LatentCache(NamedTuple):
    """All that a layer of latent attention keeps, whatever its number of heads."""

    latent: Float[Array, "... 1 slots latent_and_rope"]
    """The normalised latent, and after it the rotated key that the heads share."""


LayerCache = KeyValue | LatentCache
"""What a layer keeps, by its kind of attention."""

Cache = tuple[tuple[LayerCache, ...], ...]
"""One entry a stack, one a layer of its unit; arrays lead with the stack's repeats, if there are
several."""


def empty_cache(config: TransformerConfig, batch: int, length: int, chunk: int = 1) -> Cache:
    """A zeroed cache for rows of up to `length` positions.

    Args:
        config: the model.
        batch: rows.
        length: positions of a row.
        chunk: tokens of a row that are written at once; the first of them still sees its window
            when the last is written.
    """

    def layer(attention: AttentionConfig | LatentAttentionConfig, repeats: int) -> LayerCache:
        slots = min(length, attention.window - 1 + chunk) if attention.window else length

        def zeros(heads: int, width: int) -> Float[Array, "... batch heads slots width"]:
            stacked = (repeats,) if repeats > 1 else ()
            made = jnp.zeros((*stacked, batch, heads, slots, width), config.dtypes.compute)
            axes = (None,) * len(stacked)
            return constrain(made, *axes, BATCH_AXES, "tensor" if heads > 1 else None)

        if isinstance(attention, LatentAttentionConfig):
            return LatentCache(zeros(1, attention.latent_width + attention.rope_head_dim))
        shape = (attention.kv_heads, attention.head_dim)
        return KeyValue(zeros(*shape), zeros(*shape))

    return tuple(
        tuple(layer(layer_config.attention, stack.repeats) for layer_config in stack.unit)
        for stack in config.stacks
    )


def written(
    slots: Shaped[Array, "batch heads slots width"],
    values: Shaped[Array, "batch seq heads width"],
    positions: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"],
) -> Shaped[Array, "batch heads slots width"]:
    """A part of a cache with `values` in the slots of their positions.

    Padding, of segment 0, is not written; but of rows of a single token all are, which does not
    matter: one that is padding has no text that anybody reads.
    """
    batch, _, count, _ = slots.shape
    values = values.astype(slots.dtype)
    places = positions % count
    if values.shape[1] == 1 and batch <= _ROWS_APART and _on_one_cpu():
        for row in range(batch):
            one = jnp.swapaxes(values[row : row + 1], 1, 2)
            slots = jax.lax.dynamic_update_slice(slots, one, (row, 0, places[row, 0], 0))
        return slots
    places = jnp.where(segment_ids > 0, places, count)
    rows = jnp.arange(batch)[:, None]
    return slots.at[rows, :, places].set(values, mode="drop")


def slot_positions(
    positions: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"], slots: int
) -> Int[Array, "batch {slots}"]:
    """The position that each slot holds once the tokens are written; negative: none yet.

    That is the last one up to the row's last token that falls on the slot.
    """
    last = jnp.max(jnp.where(segment_ids > 0, positions, -1), axis=1, keepdims=True)
    return last - (last - jnp.arange(slots)) % slots


def copied(
    into: Cache,
    other: Cache,
    rows: Int[Array, " some"],
    slots: Int[Array, " some"],
    lengths: Int[Array, " some"],
) -> Cache:
    """`into`, with the first `lengths` positions of `rows` of `other` in its rows `slots`.

    Both are of the same model, and may differ in rows and in the positions there is room for;
    `into` has room for `lengths`. A slot that `into` does not have is left out.
    """

    def leaf(old: Array, new: Array) -> Array:
        some = jnp.take(new, rows, axis=-4)
        room, others = old.shape[-2], new.shape[-2]
        if others > room:  # longer rows, or of a window that was read in chunks
            last = lengths[:, None] - 1
            held = (last - (last - jnp.arange(room)) % room) % others
            held = jnp.expand_dims(held, (*range(old.ndim - 4), -3, -1))
            some = jnp.take_along_axis(some, held, axis=-2)
        return old.at[..., slots, :, : some.shape[-2], :].set(some.astype(old.dtype), mode="drop")

    return jax.tree.map(leaf, into, other)


def squeezed(cache: Cache, batch: int) -> Cache:
    """A cache of `batch` rows as a loop is to hand it on: a single row, on a CPU, without its axis.

    With the axis XLA writes each token into two copies of the cache, one to be read without the
    axis and one to be handed on with it, and a step takes a seventh longer.
    """
    alone = batch == 1 and _on_one_cpu()
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, -4), cache) if alone else cache


def unsqueezed(cache: Cache, batch: int) -> Cache:
    """The inverse of `squeezed`."""
    alone = batch == 1 and _on_one_cpu()
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, -4), cache) if alone else cache


def _on_one_cpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)
