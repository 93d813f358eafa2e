"""Batches on devices: shuffled training batches by step, and evaluation batches in order."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from jaxllm.data.rows import RandomAccessRows, Row, TokenRows
from jaxllm.errors import UserError

Batch = dict[str, jax.Array]
"""Global arrays of shape `[batch, …]`, by the names of a row's arrays."""


class BatchSource:
    """Training batches by step: batch `k` is rows `k·B … k·B + B - 1`, whatever the devices.

    Each process builds the rows of its own devices only. After batch `k` was asked for, the next
    ones are made in a background thread; asking for any other step is right, and only slower.
    """

    def __init__(
        self,
        rows: RandomAccessRows,
        batch_size: int,
        sharding: jax.sharding.NamedSharding,
        prefetch: int = 2,
    ):
        """Starts no work before the first call.

        Args:
            rows: rows without end, or as many as will be asked for.
            batch_size: global rows in a batch.
            sharding: how a batch lies on devices; its first axis is the batch's.
            prefetch: how many batches to make ahead.

        Raises:
            UserError: the devices cannot divide the batch.
        """
        _check_divisible(batch_size, sharding)
        self._rows = grain.MapDataset.source(rows)
        self._batch_size = batch_size
        self._sharding = sharding
        self._prefetch = prefetch
        self._pending: dict[int, concurrent.futures.Future[Batch]] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __call__(self, step: int, state: Any = None) -> Batch:
        """The batch of `step`; `state` is for sources that ask the model, and is not used.

        Raises:
            Exception: whatever reading the rows of this step raised, in whichever thread.
        """
        wanted = range(step, step + 1 + self._prefetch)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for ahead in wanted:
            if ahead not in self._pending:
                self._pending[ahead] = self._executor.submit(self._make, ahead)
        return self._pending.pop(step).result()

    def _make(self, step: int) -> Batch:
        first = step * self._batch_size
        return _global_batch(lambda row: self._rows[first + row], self._batch_size, self._sharding)

    def close(self) -> None:
        """Stops the thread after the batch it is making."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()


class EvalBatches:
    """Rows in order, once: iterate for batches; the last one is filled up with empty rows.

    Empty rows have zero weight everywhere, so sums over batches are sums over rows.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        sharding: jax.sharding.NamedSharding,
        max_batches: int = 0,
    ):
        """Args as of `BatchSource`; at most `max_batches`, of rows spread over all; 0: all rows.

        Raises:
            UserError: the devices cannot divide the batch.
        """
        _check_divisible(batch_size, sharding)
        self._rows = rows
        self._batch_size = batch_size
        self._sharding = sharding
        batches = -(-len(rows) // batch_size)
        self._batches = min(batches, max_batches) if max_batches else batches
        # Some stand for all: every so-many-th row, rather than those of the first documents.
        self._stride = batches // self._batches if batches else 1

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(self._batches):
            first = batch * self._batch_size
            yield _global_batch(
                functools.partial(self._row_or_empty, first), self._batch_size, self._sharding
            )

    def _row_or_empty(self, first: int, row: int) -> Row:
        index = self._stride * (first + row)
        return self._rows[index] if index < len(self._rows) else self._rows.empty()


def _rows_sharding(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """How the first axis alone lies on devices."""
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))


def _check_divisible(batch_size: int, sharding: jax.sharding.NamedSharding) -> None:
    try:
        _rows_sharding(sharding).shard_shape((batch_size,))
    except ValueError:
        raise UserError(
            f"config.batch_size: {batch_size} rows cannot be divided over the devices of the mesh "
            f"{dict(sharding.mesh.shape)}; make it a multiple of those along "
            f"{sharding.spec[0]}."
        ) from None


def _global_batch(
    row: Callable[[int], Row], batch_size: int, sharding: jax.sharding.NamedSharding
) -> Batch:
    """Rows `0 … batch_size - 1` as global arrays; builds the rows of this process alone."""
    indices = _rows_sharding(sharding).addressable_devices_indices_map((batch_size,))
    spans = {index[0].indices(batch_size) for index in indices.values() if index is not None}
    blocks = {span: _stack([row(number) for number in range(*span)]) for span in spans}
    used = set()

    def block_of_device(name: str, index: tuple[slice, ...]) -> np.ndarray:
        span = index[0].indices(batch_size)
        used.add(span)
        return blocks[span][name][:, *index[1:]]

    batch: Batch = {
        name: jax.make_array_from_callback(
            (batch_size, *array.shape[1:]), sharding, functools.partial(block_of_device, name)
        )
        for name, array in next(iter(blocks.values())).items()
    }
    assert used == spans, f"rows {spans} were built, and the devices of this process took {used}"
    return batch


def _stack(rows: list[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
