"""The held-out split: by hash of group, with near-identical documents kept on one side.

Near-identical documents are found by MinHash signatures of word shingles (Broder 1997), banded
for locality-sensitive hashing (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3), and joined with their groups by union-find.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from datasketch import MinHash
from jaxtyping import Bool, UInt32

from jaxllm.data.documents import Document
from jaxllm.errors import UserError

Signature = UInt32[np.ndarray, " permutations"]

SPLIT_VERSION = 1
"""Changes when the same documents may come to lie on other sides."""

_PERMUTATIONS = 64
_BANDS = 16  # of 4 values: a pair of similarity 0.8 shares a band with probability 0.9998
_NEAR_IDENTICAL = 0.7  # estimated Jaccard similarity of the two sets of shingles
_WORDS_PER_SHINGLE = 5
_SHINGLES_AT_ONCE = 1 << 15  # bounds the memory that one long document takes

# Scripts written without spaces count each character as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def held_out(
    documents: Iterable[Document],
    fraction: float,
    progress: Callable[[Document], None] = lambda document: None,
) -> Bool[np.ndarray, " documents"]:
    """Which documents are held out for evaluation, in order.

    Documents of one group, and near-identical documents with all of their groups, form one
    cluster. A cluster's side follows from the hash of its least group name alone, so it does not
    depend on what else there is or in which order. At least one cluster lies on each side.

    Args:
        documents: read once, as a stream; only signatures are kept.
        fraction: share of clusters to hold out, in expectation.
        progress: called with each document once it has been read.

    Raises:
        UserError: all documents form one cluster, which cannot be divided.
    """
    clusters = _Clusters()
    neighbours = _Neighbours()
    groups = []
    for document in documents:
        groups.append(document.group)
        clusters.add(document.group)
        for group in neighbours.near_identical(document):
            clusters.join(document.group, group)
        progress(document)
    names = [clusters.name(group) for group in groups]
    shares = {name: _share(name) for name in set(names)}
    if len(shares) < 2:
        raise UserError(
            f"config.data.train: its {len(groups)} document(s) belong together (one file, or "
            "near-identical texts), so none can be held out; name held-out text in "
            "config.data.eval, or give more documents."
        )
    ordered = sorted(shares, key=lambda name: shares[name])
    chosen = {name for name in ordered if shares[name] < fraction}
    chosen = (chosen | {ordered[0]}) - {ordered[-1]}
    return np.array([name in chosen for name in names], bool)


def _share(name: str) -> float:
    """A number in [0, 1) that the name alone decides, spread evenly over names."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=b"held-out split").digest()
    return int.from_bytes(digest, "big") / 2**64


class _Clusters:
    """Union-find over group names; a cluster goes by its least name."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def add(self, name: str) -> None:
        self._parents.setdefault(name, name)

    def name(self, name: str) -> str:
        while (parent := self._parents[name]) != name:
            self._parents[name] = self._parents[parent]
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        least, greatest = sorted((self.name(one), self.name(other)))
        self._parents[greatest] = least


class _Neighbours:
    """Documents seen so far, found again by near-identical ones.

    A document is compared with the first one of each of its bands only, so that the work stays
    linear in documents even where thousands are variants of one template.
    """

    def __init__(self) -> None:
        self._minhash = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        self._first: list[dict[bytes, tuple[str, Signature]]] = [{} for _ in range(_BANDS)]

    def near_identical(self, document: Document) -> set[str]:
        """Groups of near-identical documents seen before; `document` counts as seen from now."""
        signature = self._signature(document.text)
        groups = set()
        bands = signature.reshape(_BANDS, -1)
        for first, band in zip(self._first, bands, strict=True):
            group, other = first.setdefault(band.tobytes(), (document.group, signature))
            if other is signature or group in groups:
                continue
            if np.count_nonzero(signature == other) >= _NEAR_IDENTICAL * _PERMUTATIONS:
                groups.add(group)
        return groups

    def _signature(self, text: str) -> Signature:
        self._minhash.clear()
        for shingles in _shingles(text):
            self._minhash.update_batch(shingles.tolist())
        return self._minhash.hashvalues.copy()


def _shingles(text: str) -> Iterator[UInt32[np.ndarray, " shingles"]]:
    """Hashes of each run of five words, some thousands at a time; of fewer in a shorter text."""
    words = _WORD.findall(text.lower()) or [text.strip()]
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
