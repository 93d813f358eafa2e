"""Responses as rows: one to a row, behind its prompt, with what was said of each token."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.data.prompts import Prompt


class Response(NamedTuple):
    """What stands behind a prompt."""

    ids: tuple[int, ...]
    """Its tokens; one that ends it is the last."""
    log_probs: tuple[float, ...]
    """Of each, as the sampler tells; 0 of those that the policy has not chosen."""
    chosen: tuple[bool, ...]
    """Which of them the policy has chosen; the others a tool has written."""
    text: str
    """The tokens decoded, without what ends them."""
    ended: bool
    """Whether it has an end, or only came to the limit."""


Rows = dict[str, np.ndarray]
INTEGERS = ("tokens", "targets", "positions", "segment_ids")
"""Arrays of rows that are int32; all others are float32."""


def rows_of(asked: Sequence[Prompt], written: Sequence[Response], places: int) -> Rows:
    """The rows that a policy learns from, arrays [rows, places].

    Beside what next-token prediction has, where `loss_weights` are 1 at the places whose target
    the policy has chosen: its actions. `value_weights` are 1 there and, of a response that has
    ended, at its last token, in whose state nothing is chosen any more. `sampler_log_probs` are
    those that the sampler tells of each action.

    Args:
        asked: the prompt of each row.
        written: the response to it.
        places: of a row; as many as the longest prompt and response together at least.
    """
    shape = len(asked), places
    floats = ("loss_weights", "value_weights", "sampler_log_probs")
    rows: Rows = {name: np.zeros(shape, np.int32) for name in INTEGERS}
    rows |= {name: np.zeros(shape, np.float32) for name in floats}
    for row, (prompt, response) in enumerate(zip(asked, written, strict=True)):
        ids = (*prompt.ids, *response.ids)
        begin, end = len(prompt.ids) - 1, len(ids) - 1
        rows["tokens"][row, : len(ids)] = ids
        rows["targets"][row, :end] = ids[1:]
        rows["positions"][row, : len(ids)] = np.arange(len(ids))
        rows["segment_ids"][row, : len(ids)] = 1
        rows["loss_weights"][row, begin:end] = response.chosen
        rows["value_weights"][row, begin:end] = response.chosen
        rows["value_weights"][row, end] = response.ended
        rows["sampler_log_probs"][row, begin:end] = response.log_probs
    return rows


def on_devices(rows: Rows, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Rows that every process has, each device with its own."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in rows.items()
    }


def bucket(rows: Rows) -> int:
    """Places that the longest row takes, rounded up so that there are eight lengths at most: each
    is compiled once."""
    used = np.flatnonzero(np.any(rows["segment_ids"] > 0, axis=0))
    places = rows["segment_ids"].shape[1]
    step = max(8, -(-places // 8))
    longest = int(used.max(initial=0)) + 1
    return min(places, -(-longest // step) * step)
