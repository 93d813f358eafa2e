"""Documents of token stores cut in two: a beginning to go on from, and what followed it there."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxllm.data.prompts import Prompt
from jaxllm.data.store import TokenStore

FOLLOWED = "followed"
"""Of a prompt's record: the ids that followed it."""

_Cuts = Int64[np.ndarray, "pieces 3"]
"""Of each piece of a shard where it begins, is cut, and ends."""


@dataclasses.dataclass(frozen=True)
class Beginnings(Sequence[Prompt]):
    """The beginnings of a store as prompts; only where they are is held in memory."""

    store: TokenStore
    shards: Int64[np.ndarray, " pieces"]
    cuts: _Cuts
    dropped: int
    """Documents that have none."""

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: Any) -> Any:
        begin, cut, end = self.cuts[index].tolist()
        ids = self.store.tokens(int(self.shards[index]))[begin:end].tolist()
        return Prompt(tuple(ids[: cut - begin]), (), {FOLLOWED: tuple(ids[cut - begin :])})


def text_beginnings(store: TokenStore, longest: int, room: int) -> Beginnings:
    """Documents in pieces of `longest + room` tokens, each its first `longest` and what followed;
    of the last piece of a document as many as there are, if there are more than `longest`.

    Args:
        store: of text.
        longest: tokens of a prompt.
        room: tokens that follow, at most.
    """

    def of_shard(number: int) -> tuple[_Cuts, int]:
        offsets = np.asarray(store.offsets(number))
        lengths = np.diff(offsets)
        counts = np.maximum(0, -(-(lengths - longest) // (longest + room)))
        first = np.repeat(np.cumsum(counts) - counts, counts)
        within = (np.arange(int(counts.sum())) - first) * (longest + room)
        begins = np.repeat(offsets[:-1], counts) + within
        ends = np.minimum(begins + longest + room, np.repeat(offsets[1:], counts))
        return np.stack([begins, begins + longest, ends], axis=1), int(np.sum(counts == 0))

    return _beginnings(store, of_shard)


def first_answers(store: TokenStore, longest: int, room: int, bos_id: int | None) -> Beginnings:
    """Conversations up to their first answer, and that.

    Args:
        store: of conversations, which says of each token whether it is learnt.
        longest: tokens of a prompt at most; a conversation that begins with more is left out.
        room: tokens of an answer; what is longer loses its end.
        bos_id: a token that a prompt may end with though it is learnt; None: there is none.
    """

    def cuts(number: int) -> Iterator[tuple[int, int, int]]:
        ids, trained = store.tokens(number), np.asarray(store.trained(number))
        offsets = store.offsets(number)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            cut = begin + int(np.argmax(trained[begin:end]))
            cut += int(ids[cut]) == bos_id
            stop = cut + int(np.argmin(np.append(trained[cut:end], False)))
            if 0 < cut - begin <= longest and stop > cut:
                yield begin, cut, min(stop, cut + room)

    def of_shard(number: int) -> tuple[_Cuts, int]:
        found = np.array(list(cuts(number)), np.int64).reshape(-1, 3)
        return found, store.shards[number].documents - len(found)

    return _beginnings(store, of_shard)


def _beginnings(store: TokenStore, of_shard: Callable[[int], tuple[_Cuts, int]]) -> Beginnings:
    found = [of_shard(number) for number in range(len(store.shards))]
    sizes = [len(cuts) for cuts, _ in found]
    return Beginnings(
        store,
        np.repeat(np.arange(len(found)), sizes),
        np.concatenate([np.zeros((0, 3), np.int64), *(cuts.astype(np.int64) for cuts, _ in found)]),
        sum(dropped for _, dropped in found),
    )
