"""Rows repeated without end, in another order each epoch, reached in any order."""

import sys

from jaxllm.data.permutation import Permutation
from jaxllm.data.rows import RandomAccessRows, Row


class ShuffledEpochs:
    """Rows repeated without end, each epoch in an order of its own: element `k` is a function of
    (rows, seed, stream, k), and takes no memory.
    """

    # Grain's own shuffle takes milliseconds an element for a dataset of a few rows, shares its
    # orders between neighbouring seeds (epoch 1 of seed 0 is epoch 0 of seed 1), and ends at
    # 2^32 rows.

    def __init__(self, rows: RandomAccessRows, seed: int, stream: int = 0):
        """`stream` tells the sources of a mixture apart: equal ones get different orders."""
        self._rows = rows
        self._seed = seed
        self._stream = stream
        self._epoch = 0, self._order(0)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(int(index), len(self._rows))
        known, order = self._epoch  # one read: another thread may ask for another epoch
        if known != epoch:
            order = self._order(epoch)
            self._epoch = epoch, order
        return self._rows[order(place)]

    def _order(self, epoch: int) -> Permutation:
        return Permutation(len(self._rows), f"{self._seed} {epoch} {self._stream}")
