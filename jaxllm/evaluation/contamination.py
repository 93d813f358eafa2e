"""Which evaluation items stand in the training text, by the n-grams of words that both have.

After Brown et al. 2020, "Language Models are Few-Shot Learners" (https://arxiv.org/abs/2005.14165),
appendix C: an item is contaminated if it shares a 13-gram with the training text. Words are runs of
letters and digits, in lower case; of Chinese and Japanese each character is one.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from jaxllm.data.mixture import parse_entries
from jaxllm.data.records import BadLine, Source
from jaxllm.data.sources import make_source
from jaxllm.data.words import UNSPACED
from jaxllm.errors import UserError

_BETWEEN_TEXTS = "\0"
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+|{_BETWEEN_TEXTS}")
_CHARACTERS_AT_ONCE = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of an earlier word is lost
_FILTER_BITS = np.uint64(24)

Ids = Int32[np.ndarray, " words"]
"""Words by number; 0 is every word that no item has."""


@dataclasses.dataclass(frozen=True)
class ContaminationConfig:
    """Which training text the items of tasks are looked for in."""

    train: str = ""
    """Sources of training text, written as `data.train`, weights having no effect; of records of
    any kind all texts are read. Empty: nothing is looked for."""
    ngram: int = 13
    """Words in a row by which an item is recognised."""
    min_words: int = 8
    """An item of fewer words than `ngram` is looked for as a whole, but one of fewer than this not
    at all: what is so short stands in training text by chance."""

    def __post_init__(self) -> None:
        for name in ("ngram", "min_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")


class Overlap(NamedTuple):
    """An item that shares n-grams with the training text."""

    item: int
    """Its place in the task, from 0."""
    share: float
    """Of the item's n-grams those that were found, more than 0."""
    first: str
    """The first n-gram of the item that was found, its words divided by spaces."""


@dataclasses.dataclass(frozen=True)
class TaskContamination:
    """What of a task was found."""

    items: int
    found: tuple[Overlap, ...]
    """In the order of the items."""
    too_short: tuple[int, ...]
    """Places of items that have too few words to be looked for: nothing is known of them."""

    @property
    def clean(self) -> list[int]:
        """Places of the items that were looked for and not found."""
        others = {overlap.item for overlap in self.found} | set(self.too_short)
        return [place for place in range(self.items) if place not in others]

    @property
    def contaminated(self) -> float:
        """Of the items that were looked for the share that was found; nan if none was."""
        judged = self.items - len(self.too_short)
        return len(self.found) / judged if judged else math.nan

    @property
    def unchecked(self) -> float:
        """The share of items that were not looked for."""
        return len(self.too_short) / self.items


def training_texts(config: ContaminationConfig, max_bad_fraction: float) -> Iterator[str]:
    """All texts of the records of `config.train`, whatever their fields.

    Args:
        config: which sources.
        max_bad_fraction: share of the lines of a source that may be bad; these are passed over.

    Raises:
        UserError: at once if a source does not exist; while they are read if one cannot be, has
            too many bad lines, or holds no text.
    """
    field = "contamination.train"
    sources = [
        make_source(entry.name, field, parse_special_tokens=False)
        for entry in parse_entries(config.train, field)
    ]
    return (text for source in sources for text in _texts_of(source, max_bad_fraction))


def find_contamination(
    items: Mapping[str, Sequence[str]],
    training: Iterable[str],
    n: int = 13,
    min_words: int = 8,
) -> dict[str, TaskContamination]:
    """Looks for the n-grams of evaluation items in training text.

    An item with at least `min_words` but fewer than `n` words is looked for as one n-gram of its
    own length. N-grams are found by 64-bit hashes, and compared word by word before they count.
    Memory grows with the items; the training text passes through once.

    Args:
        items: the texts of each task's items, by the task's name.
        training: training texts; an n-gram lies within one of them.
        n: words of an n-gram.
        min_words: see above.

    Returns:
        By the task's name.
    """
    texts = [text for of_task in items.values() for text in of_task]
    words = [_words(text.replace(_BETWEEN_TEXTS, " ")) for text in texts]
    numbers: dict[str, int] = {}
    ids = [
        np.array([numbers.setdefault(word, len(numbers) + 1) for word in of_item], np.int32)
        for of_item in words
    ]
    looked_for = [min(n, len(of_item)) for of_item in words]
    # Of fixed values: the same grams are hashed alike in every process.
    values = np.random.default_rng(0).integers(2**64, size=len(numbers) + 1, dtype=np.uint64)
    shortest = min(n, min_words)
    lengths = sorted({length for length in looked_for if length >= shortest})
    grams = {length: _Grams(ids, looked_for, length, values) for length in lengths}
    for batch in _batches(training) if grams else ():
        found = _words(batch)
        numbered = np.fromiter(map(numbers.get, found, repeat(0)), np.int32, len(found))
        for length, hashes in _hashes(values[numbered], lengths):
            grams[length].look_in(numbered, hashes)
    shares = {item: share for of_length in grams.values() for item, share in of_length.shares()}
    overlaps = {
        item: (share, " ".join(words[item][first : first + looked_for[item]]))
        for item, (share, first) in shares.items()
    }
    results, begin = {}, 0
    for task, of_task in items.items():
        places = range(len(of_task))
        results[task] = TaskContamination(
            len(of_task),
            tuple(Overlap(i, *overlaps[begin + i]) for i in places if begin + i in overlaps),
            tuple(i for i in places if looked_for[begin + i] < shortest),
        )
        begin += len(of_task)
    return results


class _Grams:
    """The n-grams of one length of all items that are looked for by it."""

    def __init__(
        self,
        ids: Sequence[Ids],
        looked_for: Sequence[int],
        length: int,
        values: UInt64[np.ndarray, " vocabulary"],
    ):
        """Takes them from the words of all items, as numbers.

        Args:
            ids: of each item.
            looked_for: the length by which each item is looked for.
            length: the one of these.
            values: of each word, what hashes are made of.
        """
        self._length = length
        chosen = [item for item, other in enumerate(looked_for) if other == length]
        self._ids = np.concatenate([ids[item] for item in chosen])
        counts = np.array([len(ids[item]) - length + 1 for item in chosen])
        ends = np.cumsum([len(ids[item]) for item in chosen])
        self._items = np.repeat(chosen, counts)
        # Of each n-gram, the place in its item, and that in the words of all.
        self._places = np.concatenate([np.arange(count) for count in counts])
        begins = ends - counts - length + 1
        starts = np.repeat(begins, counts) + self._places
        ((_, hashes),) = _hashes(values[self._ids], [length])
        self._hashes, first, self._same = np.unique(
            hashes[starts], return_index=True, return_inverse=True
        )
        self._starts = starts[first]
        assert np.array_equal(self._rows(self._ids, starts), self._known(self._same))
        self._found = np.zeros(len(self._hashes), bool)
        self._filter = np.zeros(1 << int(_FILTER_BITS), bool)
        self._filter[_top_bits(self._hashes)] = True

    def look_in(self, ids: Ids, hashes: UInt64[np.ndarray, " windows"]) -> None:
        """Notes which of the n-grams are among those of a training text."""
        (places,) = np.nonzero(self._filter[_top_bits(hashes)])
        nearest = np.searchsorted(self._hashes, hashes[places])
        nearest = np.minimum(nearest, len(self._hashes) - 1)
        new = (self._hashes[nearest] == hashes[places]) & ~self._found[nearest]
        nearest, places = nearest[new], places[new]
        equal = (self._known(nearest) == self._rows(ids, places)).all(axis=1)
        self._found[nearest[equal]] = True

    def shares(self) -> Iterator[tuple[int, tuple[float, int]]]:
        """Items of which something was found: how much, and the place of the first n-gram."""
        found = self._found[self._same]
        total, of_those = np.bincount(self._items), np.bincount(self._items, found)
        items, first = np.unique(self._items[found], return_index=True)
        for item, place in zip(items.tolist(), self._places[found][first].tolist(), strict=True):
            yield item, (float(of_those[item] / total[item]), place)

    def _known(self, which: Int64[np.ndarray, " grams"]) -> Int32[np.ndarray, "grams length"]:
        return self._rows(self._ids, self._starts[which])

    def _rows(
        self, ids: Ids, starts: Int64[np.ndarray, " grams"]
    ) -> Int32[np.ndarray, "grams length"]:
        return ids[starts[:, None] + np.arange(self._length)]


def _hashes(
    values: UInt64[np.ndarray, " words"], lengths: Sequence[int]
) -> Iterator[tuple[int, UInt64[np.ndarray, " windows"]]]:
    """For each of the ascending lengths, polynomial hashes modulo 2^64 of all n-grams of it."""
    hashes = values
    for length in range(1, lengths[-1] + 1):
        if len(values) < length:
            hashes = values[:0]
        elif length > 1:
            hashes = hashes[:-1] * _FACTOR + values[length - 1 :]
        if length in lengths:
            yield length, hashes


def _top_bits(hashes: UInt64[np.ndarray, " any"]) -> UInt64[np.ndarray, " any"]:
    return hashes >> (np.uint64(64) - _FILTER_BITS)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _batches(texts: Iterable[str]) -> Iterator[str]:
    """The texts joined to longer ones, so that arrays are worth their while."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield _BETWEEN_TEXTS.join(batch)
            batch, size = [], 0
    yield _BETWEEN_TEXTS.join(batch)


def _texts_of(source: Source, max_bad_fraction: float) -> Iterator[str]:
    """As `training_texts`, of one source."""
    lines, bad, found = 0, 0, False
    first: BadLine | None = None
    for record in source.records():
        lines += 1
        if isinstance(record, BadLine):
            bad, first = bad + 1, first or record
            continue
        for text in _texts(record.fields):
            found = found or bool(text.strip())
            yield text
    if first is not None and bad > max_bad_fraction * lines:
        raise UserError(
            f"config.contamination.train: {source.name}: {bad} of the {lines} lines read are bad, "
            f"more than config.data.max_bad_fraction={max_bad_fraction:g} allows; the first is "
            f"{first.file}:{first.line} ({first.reason})."
        )
    if not found:
        raise UserError(
            f"config.contamination.train: {source.name} holds no text to look for items in; name "
            "the text that the model was trained on."
        )


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, but for names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _texts(inner))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        yield from (text for inner in value for text in _texts(inner))
