"""Rows of tokens reached in any order, and those of `data.packing=concat`: fixed windows."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from jaxllm.data.store import Offsets, Tokens, TokenStore

Row = dict[str, np.ndarray]
"""One row, or one batch of rows with a leading axis; see `PackedRows`."""


@runtime_checkable
class RandomAccessRows(Protocol):
    """Rows reached by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@runtime_checkable
class TokenRows(RandomAccessRows, Protocol):
    """Rows of a token store."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def fill_rate(self) -> float:
        """Share of all places that hold a token with a target, rather than padding; 0 to 1."""
        ...

    def empty(self) -> Row:
        """A row of padding alone, with the arrays that rows have: zero everywhere."""
        ...


class ChainedRows:
    """The rows of several sources, one after another."""

    def __init__(self, sources: Sequence[RandomAccessRows]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(rows) for rows in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        source = bisect.bisect_right(self._ends, index)
        return self._sources[source][index - (self._ends[source - 1] if source else 0)]


class ShardedRows:
    """What rows of a store have in common: shard after shard, each with a number of rows."""

    def __init__(self, seq_len: int, rows_of_shards: Iterable[int], targets: int):
        """`targets`: tokens with a target in all rows together."""
        self.seq_len = seq_len
        self._ends = list(itertools.accumulate(rows_of_shards))
        self._targets = targets

    @property
    def fill_rate(self) -> float:
        return self._targets / (len(self) * self.seq_len) if len(self) else 0.0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def empty(self) -> Row:
        return empty_row(self.seq_len)

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of a row, and the row's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


class PackedRows(ShardedRows):
    """A store's documents end to end, cut every `seq_len` tokens; row `i` is `rows[i]`.

    A row is a dict of arrays of shape `[seq_len]`:

    - `tokens` int32: a window of a shard.
    - `targets` int32: the window one token later.
    - `loss_weights` float32: 1 where the target continues a document; 0 where it is the first
      token (`bos`) of the next one, and at padding. So over all rows every token of the store but
      the first of each document is a target with weight 1 exactly once.
    - `segment_ids` int32: 1, 2, … for the documents of the row in order, 0 at padding.
    - `positions` int32: from 0 in each segment of the row.

    A shard's last row is padded to length. A document that reaches over several rows starts in
    each of them at position 0. Padding is known by `segment_ids`, never by a token's value.
    """

    def __init__(self, store: TokenStore, seq_len: int, document_mask: bool = True):
        """Opens the shards of `store`.

        Args:
            store: what to read.
            seq_len: tokens in a row.
            document_mask: False makes a row one segment, with positions running through it.
        """
        super().__init__(
            seq_len,
            (-(-(shard.tokens - 1) // seq_len) for shard in store.shards),
            sum(shard.tokens - 1 for shard in store.shards),
        )
        self._document_mask = document_mask
        self._shards: list[tuple[Tokens, Offsets]] = [
            # Plain views of the memory maps: slicing a `memmap` costs more than a row.
            (store.tokens(number).view(np.ndarray), store.offsets(number).view(np.ndarray))
            for number in range(len(store.shards))
        ]
        self._places = np.arange(seq_len, dtype=np.int32)

    def __getitem__(self, index: int) -> Row:
        shard, number = self._find(index)
        tokens, offsets = self._shards[shard]
        start = number * self.seq_len
        window = np.asarray(tokens[start : start + self.seq_len + 1], np.int32)
        low, high = np.searchsorted(offsets, [start, start + len(window)])
        starts = np.asarray(offsets[low:high]) - start
        return self._row(window, starts)

    def _row(
        self, window: Int32[np.ndarray, " window"], starts: Int64[np.ndarray, " starts"]
    ) -> Row:
        """The row of a window of up to `seq_len + 1` tokens, with documents at `starts`."""
        size = len(window) - 1  # inputs that have a target
        row = empty_row(self.seq_len)
        row["tokens"][:size] = window[:-1]
        row["targets"][:size] = window[1:]
        row["loss_weights"][:size] = 1
        row["loss_weights"][starts[starts > 0] - 1] = 0
        within = starts[(starts > 0) & (starts < size)] if self._document_mask else starts[:0]
        marks = np.zeros(size, np.int32)
        marks[within] = 1
        row["segment_ids"][:size] = 1 + np.cumsum(marks)
        # Distance from the latest start: a start writes its own place, and the running maximum
        # carries it to the right.
        places = self._places[:size]
        row["positions"][:size] = places - np.maximum.accumulate(marks * places)
        return row


def empty_row(seq_len: int) -> Row:
    """A row of padding alone: zero everywhere."""
    names = ("tokens", "targets", "segment_ids", "positions")
    row = {name: np.zeros(seq_len, np.int32) for name in names}
    return row | {"loss_weights": np.zeros(seq_len, np.float32)}
