"""What an objective is: pure functions whose sums and weights are totalled by the loop."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Key

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Sums = dict[str, Float[Array, ""]]
RowKeys = Key[Array, " batch"] | None
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
Complete = Callable[[Params, Params, Batch], Batch]
"""`complete(params, frozen, batch) -> batch`, with arrays that the parameters decide."""
Memory = Mapping[str, Any]
"""What an algorithm keeps from step to step, in `TrainState.extra`."""
Remember = Callable[[Memory, Mapping[str, Float[Array, ""]]], Memory]
"""`remember(memory, metrics) -> memory`, after a step, of the means that it measured."""


def _as_it_is(params: Params, frozen: Params, batch: Batch) -> Batch:
    del params, frozen
    return batch


def _as_it_was(memory: Memory, metrics: Mapping[str, Float[Array, ""]]) -> Memory:
    del metrics
    return memory


class Objective(NamedTuple):
    """A loss Σₜ coefficientₜ · sumₜ / weightₜ over named terms t.

    The weights are totalled over the whole global batch first, and the sums are then
    differentiated against those totals; so a result cannot depend on how the batch was split
    over micro-batches or devices. For that, sums and weights must add up over rows: whatever
    couples rows is computed where the batch is made.
    """

    coefficients: Mapping[str, float]
    """Of each term in the loss."""
    weights: Callable[[Batch], Sums]
    """`weights(batch) -> {term: weight}`, from the batch alone."""
    sums: Callable[[Params, Batch, Params, RowKeys], tuple[Sums, Metrics]]
    """`sums(params, batch, frozen, row_keys) -> ({term: sum}, {metric: (sum, weight)})`.

    `params` is the trainable part, `frozen` the rest of the parameters (and, for some
    objectives, other models). `row_keys` holds a key for each row, so that what a row draws
    (dropout, masks) does not depend on the split either; None in evaluation, where nothing is
    dropped."""
    complete: Complete = _as_it_is
    """What couples the rows of a batch and depends on the parameters: called with each global
    batch before its step. It is not differentiated."""
    remember: Remember = _as_it_was
    """What a step changes of the algorithm's memory; a part of the step."""
