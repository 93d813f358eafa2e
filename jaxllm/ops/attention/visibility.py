"""Which keys a query may see: the one rule that every backend honours, and its two forms."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Finite, so that a query without any visible key gives numbers rather than NaN; its exponential
# underflows to exactly 0 beside any real score, so that nothing leaks.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Places(NamedTuple):
    """Where queries and keys stand."""

    query_positions: Int[Array, "batch seq"]
    key_positions: Int[Array, "batch keys"]
    query_segment_ids: Int[Array, "batch seq"]
    key_segment_ids: Int[Array, "batch keys"]
    prefix: Int[Array, "batch seq"] | None = None
    """How many positions at the beginning of its own segment a query sees, whatever its own."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is the same for all queries of a call."""

    causal: bool
    window: int
    """Distance from which on keys are not seen; 0: no limit."""
    soft_cap: float
    """Scores become soft_cap · tanh(scores / soft_cap); 0: they stay."""
    scale: float
    """Factor of q kᵀ."""
    in_order: bool
    """Keys are the row of the queries, its segments runs, positions rising by one in each."""


class Range(NamedTuple):
    """The first and last index of the keys that each query sees, both included."""

    first: Int[Array, "batch seq"]
    last: Int[Array, "batch seq"]


def visible(places: Places, rule: Rule) -> Bool[Array, "batch seq keys"]:
    """Keys of the query's segment, not in its future (or in the prefix), within the window.

    The window counts as `sliding_window` of Mistral does in Hugging Face Transformers: a query
    sees `window` keys, itself among them.
    """
    query, key = places.query_positions[:, :, None], places.key_positions[:, None, :]
    seen = places.query_segment_ids[:, :, None] == places.key_segment_ids[:, None, :]
    if rule.causal:
        past = key <= query
        if places.prefix is not None:
            past |= key < places.prefix[:, :, None]
        seen &= past
    if rule.window:
        seen &= jnp.abs(query - key) < rule.window
    return seen


def visible_range(places: Places, rule: Rule) -> Range:
    """The same as a range of indices, which `rule.in_order` allows.

    Comparing with two bounds vectorises where comparing positions and segments of every pair
    does not, and which blocks of keys are empty shows without looking at pairs.
    """
    segment_ids, positions = places.query_segment_ids, places.query_positions
    seq = segment_ids.shape[1]
    index = jnp.arange(seq, dtype=positions.dtype)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    last = jnp.broadcast_to(index, first.shape)
    if not rule.causal or places.prefix is not None:
        ends = jnp.diff(segment_ids, axis=1, append=segment_ids[:, -1:]) != 0
        end = jax.lax.cummin(jnp.where(ends, index, seq - 1), axis=1, reverse=True)
        if rule.causal:
            assert places.prefix is not None
            in_prefix = index - positions + places.prefix.astype(index.dtype) - 1
            end = jnp.clip(in_prefix, index, end)
        last = end
    if rule.window:
        first = jnp.maximum(first, index - rule.window + 1)
        last = jnp.minimum(last, index + rule.window - 1)
    return Range(first, last)
