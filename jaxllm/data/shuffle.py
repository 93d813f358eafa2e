"""Rows repeated without end, in another order each epoch, reached in any order."""

import collections
import hashlib
import sys

import numpy as np
from jaxtyping import UInt32, UInt64

from jaxllm.data.rows import RandomAccessRows, Row

Order = UInt32[np.ndarray, " rows"] | UInt64[np.ndarray, " rows"]


class ShuffledEpochs:
    """Rows repeated without end, each epoch in an order of its own: element `k` is a function of
    (rows, seed, stream, k).

    The order of an epoch is a permutation seeded by (seed, epoch, stream), held in memory at 4
    bytes a row (8 from 2^32 rows on).
    """

    # Grain's own shuffle takes milliseconds an element for a dataset of a few rows, shares its
    # orders between neighbouring seeds (epoch 1 of seed 0 is epoch 0 of seed 1), and ends at
    # 2^32 rows.

    def __init__(self, rows: RandomAccessRows, seed: int, stream: int = 0):
        """`stream` tells the sources of a mixture apart: equal ones get different orders."""
        self._rows = rows
        self._seed = seed
        self._stream = stream
        self._orders: collections.OrderedDict[int, Order] = collections.OrderedDict()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(int(index), len(self._rows))
        return self._rows[int(self.order(epoch)[place])]

    def order(self, epoch: int) -> Order:
        """The numbers of the rows in the order of an epoch."""
        order = self._orders.get(epoch)
        if order is None:
            key = (
                f"{self._seed} {epoch} {self._stream}" if self._stream else f"{self._seed} {epoch}"
            )
            digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
            # NumPy promises the same raw bits in every version, but not the same shuffle.
            keys = np.random.Philox(int.from_bytes(digest, "big")).random_raw(len(self._rows))
            order = np.argsort(keys, kind="stable")
            order = order.astype(np.uint32 if len(order) < 2**32 else np.uint64)
            self._orders[epoch] = order
            while len(self._orders) > 2:  # a batch may reach over the end of an epoch
                self._orders.popitem(last=False)
        return order
