"""Which documents are kept, and on which side of the held-out split.

Duplicates are left out first. Then the split is by hash of group, with near-identical documents
kept on one side: they are joined with their groups by union-find.
"""

import collections
import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import Document
from jaxllm.data.duplicates import SIGNATURE_VERSION, NearDuplicates
from jaxllm.errors import UserError

SPLIT_VERSION = 2 + 1000 * SIGNATURE_VERSION
"""Changes when the same documents may come to lie on other sides."""

Sides = UInt8[np.ndarray, " documents"]
"""`TRAIN`, `HELD_OUT` or `DROPPED` for each document, in order."""

TRAIN, HELD_OUT, DROPPED = 0, 1, 2

NEAR_IDENTICAL = 0.7
"""Estimated Jaccard similarity from which on two documents stay on one side."""


def divide(
    documents: Iterable[Document],
    fraction: float,
    cleaning: CleaningConfig,
    counts: collections.Counter[str],
) -> Sides:
    """Leaves out duplicates, and holds out a share of the rest.

    Documents of one group, and near-identical documents with all of their groups, form one
    cluster; without `cleaning.near_duplicates` nothing is compared, and groups are clusters. A
    cluster's side follows from the hash of its least group name alone, so it does not depend on
    the order, nor on what else there is unless that joins it. At least one lies on each side.

    Args:
        documents: read once, as a stream; only signatures are kept.
        fraction: share of clusters to hold out, in expectation.
        cleaning: which duplicates are left out.
        counts: gains what was left out, as `exact_duplicates` and `near_duplicates`.

    Raises:
        UserError: all documents form one cluster, which cannot be divided.
    """
    seen = _Seen(cleaning, counts)
    clusters = _Clusters()
    groups: list[str | None] = []
    for document in documents:
        relatives = seen.relatives(document)
        groups.append(None if relatives is None else document.group)
        if relatives is not None:
            clusters.add(document.group)
            for group in relatives:
                clusters.join(document.group, group)
    names = [None if group is None else clusters.name(group) for group in groups]
    shares = {name: _share(name) for name in set(names) if name is not None}
    if len(shares) < 2:
        raise UserError(
            f"config.data.train: its {len(groups)} document(s) belong together (one file, or "
            "near-identical texts), so none can be held out; name held-out text in "
            "config.data.eval, or give more documents."
        )
    ordered = sorted(shares, key=lambda name: shares[name])
    chosen = {name for name in ordered if shares[name] < fraction}
    chosen = (chosen | {ordered[0]}) - {ordered[-1]}
    sides = (DROPPED if n is None else HELD_OUT if n in chosen else TRAIN for n in names)
    return np.fromiter(sides, np.uint8, len(names))


def keep_apart(
    held_out: Iterable[Document],
    training: Iterable[Document],
    cleaning: CleaningConfig,
    counts: collections.Counter[str],
) -> Sides:
    """All documents of `held_out`, then those of `training` that are no duplicates.

    Left out is what repeats an earlier training document, counted as `exact_duplicates` and
    `near_duplicates`, or a held-out one, counted as `held_out_duplicates`: what is measured must
    not have been trained on, even where `cleaning` allows copies.
    """
    seen = _Seen(cleaning, counts)
    sides = []
    for document in held_out:
        seen.put_held_out(document)
        sides.append(HELD_OUT)
    for document in training:
        sides.append(DROPPED if seen.relatives(document) is None else TRAIN)
    return np.array(sides, np.uint8)


class _Seen:
    """Documents kept so far, found again by equal and by similar ones."""

    def __init__(self, cleaning: CleaningConfig, counts: collections.Counter[str]) -> None:
        self._exact = cleaning.exact_duplicates
        self._near = cleaning.near_duplicates
        self._counts = counts
        self._digests: dict[bytes, bool] = {}
        self._similar = NearDuplicates()
        self._held_out: set[str] = set()

    def put_held_out(self, document: Document) -> None:
        """Keeps a document, whatever it resembles."""
        self._digests[document.digest] = True
        name = document.digest.hex()  # held-out documents are no group that training joins
        self._held_out.add(name)
        if self._near:
            self._similar.add(self._similar.signature(document.text), name)

    def relatives(self, document: Document) -> set[str] | None:
        """Groups of near-identical documents kept before; None if it is left out as a duplicate."""
        held_out = self._digests.get(document.digest)
        if held_out or (self._exact and held_out is not None):
            self._counts["held_out_duplicates" if held_out else "exact_duplicates"] += 1
            return None
        self._digests.setdefault(document.digest, False)
        if not self._near:
            return set()
        signature = self._similar.signature(document.text)
        similar = self._similar.similar(signature)
        same = [name for name, similarity in similar.items() if similarity >= self._near]
        if same:
            held_out = not self._held_out.isdisjoint(same)
            self._counts["held_out_duplicates" if held_out else "near_duplicates"] += 1
            return None
        self._similar.add(signature, document.group)
        near = {name for name, similarity in similar.items() if similarity >= NEAR_IDENTICAL}
        return near - self._held_out


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
