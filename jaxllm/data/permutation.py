"""Pseudo-random permutations of any size that take no memory: each place is computed alone."""

import functools
import hashlib

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of `0 … count - 1` that a key chooses; `count` is below 2^64.

    A Feistel network over the next larger even number of bits, applied until the result is in
    range: "cycle walking" (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The
    same on every machine and in every version of Python. A few microseconds a place.
    """

    def __init__(self, count: int, key: str):
        self._count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys = _round_keys(key)

    def __call__(self, index: int) -> int:
        """Where the permutation takes `index`."""
        half, keys, count = self._half, self._keys, self._count
        mask = (1 << half) - 1
        while True:
            left, right = index >> half, index & mask
            for key in keys:
                # The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
                mixed = (right + key) & _MASK
                mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
                mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
                left, right = right, left ^ ((mixed ^ mixed >> 31) & mask)
            index = left << half | right
            if index < count:
                return index


@functools.lru_cache(maxsize=1024)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * n : 8 * n + 8], "big") for n in range(_ROUNDS))
