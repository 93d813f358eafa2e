"""Mixtures: which source each row is drawn from, so that a batch is a function of its step.

A weight is a share of rows, so with rows that are full (`data.packing=concat`) a share of tokens.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64

from jaxllm.data.rows import ChainedRows, RandomAccessRows, Row
from jaxllm.data.shuffle import ShuffledEpochs
from jaxllm.errors import UserError

Counts = Int64[np.ndarray, " sources"] | Float64[np.ndarray, " sources"]
Shares = Float64[np.ndarray, " sources"]

_NUMBER = r"[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|inf|nan)"
_SUFFIX = re.compile(rf"(?P<name>.+)@(?P<weight>{_NUMBER})(?::(?P<epochs>[^@/]*))?", re.IGNORECASE)
_PERIOD = 1 << 16  # rows after which a mixture's pattern repeats: weights are exact to 1/65,536


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry `SOURCE[@weight[:epochs]]` of `data.train`."""

    name: str
    weight: float | None = None
    """As it was written; None where none is."""
    max_epochs: float = math.inf
    """How often its rows may be drawn."""


def parse_entries(spec: str, field: str) -> list[Entry]:
    """The entries of a comma string such as `"web/*.jsonl@0.6,books.txt@0.4:2"`.

    Args:
        spec: the comma string.
        field: the configuration field it comes from, for messages.

    Raises:
        UserError: a weight or number of epochs is no number or negative; some entries have a
            weight and others none; or all weights are zero.
    """
    entries = [_parse_entry(part.strip(), field) for part in spec.split(",") if part.strip()]
    weights = [entry.weight for entry in entries if entry.weight is not None]
    names = [entry.name for entry in entries]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"config.{field}: names {repeated[0]} twice; once, with a weight, is enough."
        )
    if 0 < len(weights) < len(entries):
        without = next(entry.name for entry in entries if entry.weight is None)
        raise UserError(
            f"config.{field}: {without} has no weight and others have one; give each source one, "
            "as in a.jsonl@0.7,b.jsonl@0.3, or none."
        )
    if weights and not any(weights):
        raise UserError(f"config.{field}: its weights sum to 0; give a source a positive one.")
    return entries


def _parse_entry(text: str, field: str) -> Entry:
    match = _SUFFIX.fullmatch(text)
    if match is None:
        return Entry(text)
    weight = _number(match["weight"], f"config.{field}: {text}: its weight")
    epochs = math.inf
    if match["epochs"] is not None:
        epochs = _number(match["epochs"], f"config.{field}: {text}: its number of epochs")
        if not epochs:
            raise UserError(f"config.{field}: {text}: its number of epochs must be positive.")
    return Entry(match["name"], weight, epochs)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{what} must be a number that is not negative; was {text!r}.")
    return value


def mixture_shares(weights: Sequence[float], temperature: float = 1.0) -> Shares:
    """The shares that sources are drawn with; they sum to 1.

    share_i = w_i^(1/T) / Σ_j w_j^(1/T), so a temperature above 1 raises the small sources (Conneau
    et al. 2020, https://arxiv.org/abs/1911.02116, with α = 1/T).

    Args:
        weights: w, not negative; or the sizes of the sources.
        temperature: T.
    """
    values = np.array(weights, np.float64)
    raised = np.where(values > 0, values / values.max(), 0.0) ** (1.0 / temperature)
    return raised / raised.sum()


@runtime_checkable
class Mixture(RandomAccessRows, Protocol):
    """Rows drawn from several sources: row `k` is a function of (sources, shares, seed, k)."""

    def drawn(self, count: int) -> Counts:
        """How many of the first `count` rows are of each source."""
        ...


def mix(
    sources: Sequence[RandomAccessRows],
    entries: Sequence[Entry],
    seed: int,
    temperature: float = 1.0,
    max_epochs: float = 0.0,
) -> Mixture:
    """The mixture that a configuration asks for; without end unless epochs are limited.

    Args:
        sources: the rows of each source, none of them empty.
        entries: their weights and limits. Without weights a source has the weight of its size.
        seed: of the order of rows.
        temperature: see `mixture_shares`.
        max_epochs: the limit of an entry that has none of its own; 0: none.
    """
    weights = [entry.weight for entry in entries if entry.weight is not None]
    limit = max_epochs or math.inf
    if not weights and temperature == 1.0:
        return PooledRows(sources, seed, limit)
    shares = mixture_shares(weights or [float(len(rows)) for rows in sources], temperature)
    limits = [min(entry.max_epochs, limit) for entry in entries]
    return MixedRows(sources, shares, seed, limits)


class PooledRows:
    """All rows of all sources, shuffled as one: every row once in each epoch."""

    def __init__(
        self, sources: Sequence[RandomAccessRows], seed: int, max_epochs: float = math.inf
    ):
        """`max_epochs`: after so many the rows end."""
        self._sizes = np.array([len(rows) for rows in sources], np.float64)
        self._rows = ShuffledEpochs(ChainedRows(sources), seed)
        self._length = rows_in_epochs(int(self._sizes.sum()), max_epochs)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._rows[int(index)]

    def drawn(self, count: int) -> Counts:
        # Exact at the end of every epoch, and what is to be expected within one.
        return count * self._sizes / self._sizes.sum()


class MixedRows:
    """Rows of several sources, endless or up to their epochs: row `k` is a function of (rows,
    shares, limits, seed, k).

    The sources take turns by a fixed pattern that spreads each evenly, so after any number of
    rows every source is within a few rows of its share. Each is shuffled anew for every epoch. One
    that has given all its epochs leaves the mixture, and the others share its place in proportion.
    """

    def __init__(
        self,
        sources: Sequence[RandomAccessRows],
        shares: Shares,
        seed: int,
        max_epochs: Sequence[float] = (),
    ):
        """Shares sum to 1; where one is 0 the source is never drawn. No limits: no end."""
        self._rows = [ShuffledEpochs(rows, seed, stream) for stream, rows in enumerate(sources)]
        limits = [
            rows_in_epochs(len(rows), epochs)
            for rows, epochs in zip(sources, max_epochs or [math.inf] * len(sources), strict=True)
        ]
        self._phases = _phases(shares, limits)

    def __len__(self) -> int:
        return self._phases[-1].end

    def __getitem__(self, index: int) -> Row:
        source, place = self.place(int(index))
        return self._rows[source][place]

    def place(self, index: int) -> tuple[int, int]:
        """Which source row `index` is of, and the how-manieth of that source it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        phase = next(phase for phase in self._phases if index < phase.end)
        return phase.place(index)

    def drawn(self, count: int) -> Counts:
        phase = next((phase for phase in self._phases if count <= phase.end), self._phases[-1])
        return phase.drawn(count)


def rows_in_epochs(rows: int, epochs: float) -> int:
    """How many of `rows` rows may be drawn in so many epochs; `sys.maxsize` if in any number."""
    # Rounded, so that 0.29 epochs of 100 rows are 29, whatever binary fractions make of it.
    return math.floor(round(rows * epochs, 6)) if math.isfinite(epochs) else sys.maxsize


class _Phase:
    """A stretch of rows over which the same sources are active."""

    def __init__(self, begin: int, drawn: Counts, shares: Shares):
        self.begin = begin
        self.end = sys.maxsize
        self._before = drawn
        self._quotas = _quotas(shares)
        # The j-th row of a source with quota q stands near (j + 1/2) / q of the period.
        sources = np.repeat(np.arange(len(shares)), self._quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self._quotas])
        ideal = (ranks + 0.5) / self._quotas[sources]
        order = np.argsort(ideal, kind="stable")
        self._source, self._rank = sources[order], ranks[order]
        self._places = [np.flatnonzero(self._source == source) for source in range(len(shares))]

    def place(self, index: int) -> tuple[int, int]:
        period, place = divmod(index - self.begin, _PERIOD)
        source = int(self._source[place])
        earlier = self._before[source] + period * self._quotas[source]
        return source, int(earlier + self._rank[place])

    def drawn(self, count: int) -> Counts:
        period, place = divmod(count - self.begin, _PERIOD)
        started = np.bincount(self._source[:place], minlength=len(self._quotas))
        return self._before + period * self._quotas + started

    def index(self, source: int, place: int) -> int:
        """The row that is the `place`-th of `source`, beyond the end of the phase too."""
        period, rank = divmod(place - int(self._before[source]), int(self._quotas[source]))
        return self.begin + period * _PERIOD + int(self._places[source][rank])


def _phases(shares: Shares, limits: Sequence[int]) -> list[_Phase]:
    """The phases of a mixture: each but an endless one ends where a source runs out."""
    phases: list[_Phase] = []
    begin, drawn = 0, np.zeros(len(shares), np.int64)
    while shares.sum() > 0:
        phase = _Phase(begin, drawn, shares / shares.sum())
        phases.append(phase)
        ends = {
            source: phase.index(source, limit)
            for source, limit in enumerate(limits)
            if limit < sys.maxsize and shares[source] > 0
        }
        if not ends:
            break
        # The first row that would ask a source for more than it may give.
        begin = phase.end = min(ends.values())
        drawn = phase.drawn(begin)
        shares = np.where([ends.get(source) == begin for source in range(len(shares))], 0.0, shares)
    return phases


def _quotas(shares: Shares) -> Counts:
    """Rows of each source in a period, by largest remainder; at least one of a positive share."""
    exact = shares * _PERIOD
    quotas = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = _PERIOD - int(quotas.sum())
    if missing >= 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:  # many tiny shares were raised to one row: the largest gives them up
        quotas[np.argmax(quotas)] += missing
    return quotas
