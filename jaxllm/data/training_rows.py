"""The rows that training draws: each source's documents packed, and all of them mixed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.mixture import Mixture, mix, rows_in_epochs
from jaxllm.data.packing import NO_VALUES, PartValues, packed_rows
from jaxllm.data.rows import TokenRows
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError

Beside = Callable[[TokenStore, TokenRows], TokenRows]
"""`beside(store, rows) -> rows`, which have more arrays."""


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """Rows of several sources, and the order in which they are drawn."""

    names: tuple[str, ...]
    """The sources, in the order of the configuration."""
    weights: tuple[float | None, ...]
    """As they were written."""
    tokens: tuple[int, ...]
    """Tokens of each source."""
    sources: tuple[TokenRows, ...]
    """The rows of each source."""
    mixture: Mixture
    """All rows that will be drawn, by number."""

    @property
    def fill_rate(self) -> float:
        """Share of the places of all sources' rows that hold a token with a target."""
        sizes = [len(rows) for rows in self.sources]
        return float(np.average([rows.fill_rate for rows in self.sources], weights=sizes))

    def epochs(self, count: int) -> Float64[np.ndarray, " sources"]:
        """How often each source has been read when `count` rows have been drawn."""
        return self.mixture.drawn(count) / np.array([len(rows) for rows in self.sources])

    def scalars(self, count: int) -> dict[str, float]:
        """Share and epochs of each source in the first `count` rows, by the names of metrics."""
        shares = self.mixture.drawn(count) / max(count, 1)
        scalars = {}
        for name, share, epochs in zip(self.names, shares, self.epochs(count), strict=True):
            scalars[f"data/source/{name}/share"] = float(share)
            scalars[f"data/source/{name}/epochs"] = float(epochs)
        return scalars


def training_rows(
    data: DataConfig,
    corpus: Corpus,
    seed: int,
    count: int,
    part_values: Callable[[TokenStore], Mapping[str, Sequence[PartValues]]] = lambda store: (
        NO_VALUES
    ),
    beside: Beside = lambda store, rows: rows,
) -> TrainingRows:
    """The rows of a corpus as training draws them.

    Args:
        data: packing, temperature and limits.
        corpus: the tokenised sources.
        seed: of the order of rows.
        count: how many will be drawn.
        part_values: what rows of a store are to tell more (`packed_rows`).
        beside: the rows of a store, with more arrays in them.

    Raises:
        UserError: a source has no full row, or the limits of epochs allow fewer rows than `count`.
    """
    sources = tuple(
        beside(
            store,
            packed_rows(store, data.packing, data.seq_len, data.document_mask, part_values(store)),
        )
        for store in corpus.train
    )
    for entry, store in zip(corpus.entries, corpus.train, strict=True):
        # Packed whole, a few short documents are what their reader wants; cut, they are a row
        # that is mostly padding, drawn over and over.
        if data.packing == "concat" and store.num_tokens <= data.seq_len:
            raise UserError(
                f"config.data.train: {entry.name}: gives {store.num_tokens:,} tokens, less than a "
                f"row of config.data.seq_len={data.seq_len}; give more text, lower seq_len, or "
                "set config.data.packing=none."
            )
    for entry, rows in zip(corpus.entries, sources, strict=True):
        limit = min(entry.max_epochs, data.max_epochs or math.inf)
        if not rows_in_epochs(len(rows), limit):
            raise UserError(
                f"config.data.train: {entry.name}: {limit:g} epochs of its {len(rows):,} rows are "
                "less than a row; raise its number of epochs, or leave it out."
            )
    mixture = mix(sources, corpus.entries, seed, data.temperature, data.max_epochs)
    if len(mixture) < count:
        raise UserError(
            f"config.steps: the run wants {count:,} rows, but the sources of config.data.train "
            f"give {len(mixture):,} in the epochs they may be read; lower steps or batch_size, or "
            "raise the limits (config.data.max_epochs, SOURCE@weight:epochs)."
        )
    return TrainingRows(
        names=tuple(entry.name for entry in corpus.entries),
        weights=tuple(entry.weight for entry in corpus.entries),
        tokens=tuple(store.num_tokens for store in corpus.train),
        sources=sources,
        mixture=mixture,
    )
