"""Packing: how the documents of a store are laid into rows of equal length.

- `concat`: end to end, cut every `seq_len` tokens (`rows.PackedRows`). Nothing is padded, and most
  rows begin and end inside a document.
- `best_fit`: whole documents, each in the fullest row that still has room for it. A document that
  is longer than a row fills rows of its own, and what is left of it is placed like a document
  (Ding et al. 2024, https://arxiv.org/abs/2404.10830).
- `none`: each document in rows of its own, padded.

The last two follow a plan, made once from the lengths of documents and kept beside the store:

    best_fit_256/pieces_00000.npy    int64 [pieces, 2]: where a piece begins in the shard, and its
                                     length in targets, row by row
    best_fit_256/rows_00000.npy      int64: the first piece of each row, and the number of pieces
    best_fit_256/plan.json           format version and fingerprint of the store; written last
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float32, Int64

from jaxllm.data.rows import PackedRows, Row, ShardedRows, TokenRows, empty_row
from jaxllm.data.store import Offsets, Tokens, TokenStore
from jaxllm.files import locked

PACKINGS = ("concat", "best_fit", "none")
PLAN_VERSION = 1

_PLAN = "plan.json"

Pieces = Int64[np.ndarray, "pieces 2"]
Bounds = Int64[np.ndarray, " rows_and_end"]
Places = Int64[np.ndarray, " pieces"]
Parts = Int64[np.ndarray, " parts"]
PartValues = Float32[np.ndarray, " parts"]
"""A number for each part of a shard's documents."""
NO_VALUES: Mapping[str, Sequence[PartValues]] = MappingProxyType({})
"""No such numbers."""


def packed_rows(
    store: TokenStore,
    packing: str,
    seq_len: int,
    document_mask: bool = True,
    part_values: Mapping[str, Sequence[PartValues]] = NO_VALUES,
) -> TokenRows:
    """The rows of a store; a plan that is needed is made, or opened if it was made before.

    Args:
        store: the tokens.
        packing: one of `PACKINGS`.
        seq_len: tokens in a row.
        document_mask: False makes a row one segment, with positions running through it.
        part_values: more that rows are to tell of the parts of documents: for each name the numbers
            of each shard's parts.
    """
    if packing == "concat":
        assert not store.masked, "examples are not cut"
        return PackedRows(store, seq_len, document_mask)
    folder = store.path / f"{packing}_{seq_len}"
    if not _is_planned(store, folder):
        with locked(store.path):
            # Another process may have made it while this one waited.
            if not _is_planned(store, folder):
                _write_plan(folder, store, packing, seq_len)
    return PlannedRows(store, folder, seq_len, document_mask, part_values)


class PlannedRows(ShardedRows):
    """Rows of whole pieces of documents, as a plan says; row `i` is `rows[i]`.

    The arrays are those of `rows.PackedRows`. A piece of n targets takes n places: its tokens but
    the last are inputs, and all but the first are targets, so the token that closes a document
    takes no place. Over all rows every token of the store but the first of each document is a
    target exactly once. Its weight is 1, but 0 where a masked store says that it is not trained.

    Where documents have parts, these are the segments, each with positions of its own, and a row
    has more arrays: `ranking_ids` int32, 1, 2, … for its documents in order, 0 at padding;
    `scores` float32, at each token that of its part; and those of `part_values`, by their names,
    with the value of a part at its last token and 0 elsewhere.
    """

    def __init__(
        self,
        store: TokenStore,
        folder: Path,
        seq_len: int,
        document_mask: bool = True,
        part_values: Mapping[str, Sequence[PartValues]] = NO_VALUES,
    ) -> None:
        """Opens the shards of `store` and the plan in `folder`."""
        self._document_mask = document_mask
        self._parts = [
            (store.parts(number).view(np.ndarray), store.scores(number).view(np.ndarray))
            for number in range(len(store.shards) if store.most_parts else 0)
        ]
        self._part_values = part_values
        self._trained = [
            store.trained(number).view(np.ndarray) if store.masked else None
            for number in range(len(store.shards))
        ]
        self._shards: list[tuple[Tokens, Pieces, Bounds]] = [
            (
                # Plain views of the memory maps: slicing a `memmap` costs more than a row.
                store.tokens(number).view(np.ndarray),
                _load(folder / f"pieces_{number:05d}.npy"),
                _load(folder / f"rows_{number:05d}.npy"),
            )
            for number in range(len(store.shards))
        ]
        super().__init__(
            seq_len,
            (len(rows) - 1 for _, _, rows in self._shards),
            store.num_tokens - store.num_documents,
        )

    def __getitem__(self, index: int) -> Row:
        shard, number = self._find(index)
        tokens, pieces, bounds = self._shards[shard]
        begins, lengths = pieces[bounds[number] : bounds[number + 1]].T
        ends = np.cumsum(lengths)
        size = int(ends[-1])
        # Counts from 0 in each piece.
        within = np.arange(size) - np.repeat(ends - lengths, lengths)
        places = np.repeat(begins, lengths) + within
        row = self.empty()
        row["tokens"][:size] = tokens[places]
        row["targets"][:size] = tokens[places + 1]
        trained = self._trained[shard]
        row["loss_weights"][:size] = 1 if trained is None else trained[places + 1]
        if self._parts:
            self._fill_parts(row, shard, begins, lengths)
        elif self._document_mask:
            row["segment_ids"][:size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            row["positions"][:size] = within
        else:
            row["segment_ids"][:size] = 1
            row["positions"][:size] = np.arange(size)
        return row

    def _fill_parts(self, row: Row, shard: int, begins: Places, lengths: Places) -> None:
        """Sets what follows from the parts of the documents that begin at `begins`."""
        starts, scores = self._parts[shard]
        parts, ranking = self._parts_of(shard, begins, lengths)
        # Where each part starts in the row, which has its documents end to end.
        places = starts[parts] - begins[ranking] + (np.cumsum(lengths) - lengths)[ranking]
        size = int(lengths.sum())
        sizes = np.diff(places, append=size)
        row["segment_ids"][:size] = np.repeat(np.arange(1, len(parts) + 1), sizes)
        row["positions"][:size] = np.arange(size) - np.repeat(places, sizes)
        row["ranking_ids"][:size] = np.repeat(ranking + 1, sizes)
        row["scores"][:size] = np.repeat(scores[parts], sizes)
        for name, of_shards in self._part_values.items():
            row[name][places + sizes - 1] = of_shards[shard][parts]

    def parts_of(self, index: int) -> tuple[int, Parts]:
        """The shard of a row, and which of the shard's parts are the row's segments, in order."""
        shard, number = self._find(index)
        _, pieces, bounds = self._shards[shard]
        begins, lengths = pieces[bounds[number] : bounds[number + 1]].T
        return shard, self._parts_of(shard, begins, lengths)[0]

    def _parts_of(self, shard: int, begins: Places, lengths: Places) -> tuple[Parts, Parts]:
        """The parts of documents, and the number of the document that each is of."""
        starts, _ = self._parts[shard]
        first, end = np.searchsorted(starts, begins), np.searchsorted(starts, begins + lengths)
        parts = np.concatenate([np.arange(*span) for span in zip(first, end, strict=True)])
        return parts, np.repeat(np.arange(len(begins)), end - first)

    def empty(self) -> Row:
        row = empty_row(self.seq_len)
        if self._parts:
            row["ranking_ids"] = np.zeros(self.seq_len, np.int32)
            for name in ("scores", *self._part_values):
                row[name] = np.zeros(self.seq_len, np.float32)
        return row


def cut_into_pieces(offsets: Offsets, seq_len: int) -> Pieces:
    """(begin, targets) of each piece, in order; a document is one unless it is longer than a row.

    A document of n tokens has n - 1 targets.
    """
    targets = np.diff(offsets) - 1
    counts = -(-targets // seq_len)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    skipped = (np.arange(int(counts.sum())) - first) * seq_len
    begins = np.repeat(offsets[:-1], counts) + skipped
    lengths = np.minimum(np.repeat(targets, counts) - skipped, seq_len)
    return np.stack([begins, lengths], axis=1)


def best_fit(lengths: Int64[np.ndarray, " pieces"], capacity: int) -> list[list[int]]:
    """Rows of piece numbers by best-fit decreasing (Johnson 1973, "Near-optimal bin packing").

    Longest first, each piece goes where it leaves the least room; equal ones in order. No piece
    is longer than `capacity`.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row has room for exactly r more
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        large_enough = rooms >> length
        if large_enough:
            room = length + (large_enough & -large_enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def _is_planned(store: TokenStore, folder: Path) -> bool:
    """Whether there is a plan of this store in `folder`, all of which can be read."""
    try:
        found = json.loads((folder / _PLAN).read_text()) == _stamp(store)
        for number in range(len(store.shards) if found else 0):
            _load(folder / f"pieces_{number:05d}.npy")
            _load(folder / f"rows_{number:05d}.npy")
    except (OSError, EOFError, ValueError):  # no plan, or a damaged one
        return False
    return found


def _write_plan(folder: Path, store: TokenStore, packing: str, seq_len: int) -> None:
    """Plans every shard; the folder appears whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for number in range(len(store.shards)):
        pieces = cut_into_pieces(np.asarray(store.offsets(number)), seq_len)
        if packing == "best_fit":
            rows = best_fit(pieces[:, 1], seq_len)
            pieces = pieces[np.fromiter(itertools.chain(*rows), np.int64, len(pieces))]
            bounds = np.cumsum([0, *map(len, rows)])
        else:
            bounds = np.arange(len(pieces) + 1)
        np.save(unfinished / f"pieces_{number:05d}.npy", pieces)
        np.save(unfinished / f"rows_{number:05d}.npy", bounds)
    (unfinished / _PLAN).write_text(json.dumps(_stamp(store)) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


def _stamp(store: TokenStore) -> dict[str, int | str]:
    return {"version": PLAN_VERSION, "fingerprint": store.fingerprint, "tokens": store.num_tokens}


def _load(path: Path) -> Int64[np.ndarray, "..."]:
    return np.load(path, mmap_mode="r").view(np.ndarray)
