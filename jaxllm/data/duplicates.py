"""Near-identical texts, by MinHash signatures of word shingles on one machine.

Signatures (Broder 1997) are banded for locality-sensitive hashing (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3). About three kilobytes of memory a text.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from datasketch import MinHash
from jaxtyping import UInt32

from jaxllm.data.words import WORD_OR_MARK

Signature = UInt32[np.ndarray, " permutations"]

SIGNATURE_VERSION = 2
"""Changes when other pairs of texts may be found near-identical."""

_PERMUTATIONS = 64
_BANDS = 16  # of 4 values: a pair of similarity 0.8 shares a band with probability 0.9998
_WORDS_PER_SHINGLE = 5
_SHINGLES_AT_ONCE = 1 << 15  # bounds the memory that one long text takes


class NearDuplicates:
    """Texts put in so far, found again by near-identical ones.

    A text is compared with the first one of each of its bands only, so that the work stays linear
    in texts even where thousands are variants of one template.
    """

    def __init__(self) -> None:
        self._minhash = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        self._first: list[dict[bytes, tuple[str, Signature]]] = [{} for _ in range(_BANDS)]

    def signature(self, text: str) -> Signature:
        """The MinHash signature of the text's shingles."""
        self._minhash.clear()
        for shingles in _shingles(text):
            self._minhash.update_batch(shingles.tolist())
        return self._minhash.hashvalues.copy()

    def add(self, signature: Signature, name: str) -> None:
        """Puts a text in, to be found under `name`."""
        for first, band in zip(self._first, _bands(signature), strict=True):
            first.setdefault(band, (name, signature))

    def similar(self, signature: Signature) -> dict[str, float]:
        """Names of texts put in before, each with its estimated Jaccard similarity."""
        found: dict[str, float] = {}
        for first, band in zip(self._first, _bands(signature), strict=True):
            name, other = first.get(band, ("", None))
            if other is not None:
                alike = np.count_nonzero(signature == other) / _PERMUTATIONS
                found[name] = max(alike, found.get(name, 0.0))
        return found


def _bands(signature: Signature) -> Iterator[bytes]:
    return (band.tobytes() for band in signature.reshape(_BANDS, -1))


def _shingles(text: str) -> Iterator[UInt32[np.ndarray, " shingles"]]:
    """Hashes of each run of five words, some thousands at a time; of fewer in a shorter text."""
    # Each sign counts as a word: code and sums are made of them.
    words = WORD_OR_MARK.findall(text.lower()) or [text.strip()]
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    count = max(1, len(words) - _WORDS_PER_SHINGLE + 1)
    mixed = np.zeros(count, np.uint64)
    for offset in range(min(_WORDS_PER_SHINGLE, len(words))):
        # Multiply and rotate, modulo 2^64: the order of the words counts, and high bits that the
        # product gathers come back to where the next product spreads them.
        mixed = (mixed ^ hashes[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed << np.uint64(29)) | (mixed >> np.uint64(35))
    unique = np.unique((mixed >> np.uint64(32)).astype(np.uint32))
    for start in range(0, len(unique), _SHINGLES_AT_ONCE):
        yield unique[start : start + _SHINGLES_AT_ONCE]
