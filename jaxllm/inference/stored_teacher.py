"""What a teacher says of the rows of a token store, computed once and kept beside the store:

teacher_FINGERPRINT/ids_00000.npy          of 1,024 rows the k likeliest tokens at each place,
                                           uint16 or uint32 [rows, seq, k]
teacher_FINGERPRINT/log_probs_00000.npy    float16: their log-probabilities
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllm.data.batches import EvalBatches
from jaxllm.data.rows import Row, TokenRows
from jaxllm.data.selection import Report
from jaxllm.data.store import TokenStore
from jaxllm.files import write_bytes_atomically
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer, output_head
from jaxllm.objectives.distillation import TEACHER_IDS, TEACHER_LOG_PROBS
from jaxllm.objectives.objective import Batch, Params
from jaxllm.ops.vocabulary import likeliest
from jaxllm.sharding.mesh import batch_sharding, constrain
from jaxllm.sharding.processes import from_main, is_main

ROWS_OF_FILE = 1024
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """A teacher that is asked once."""

    model: TransformerConfig
    identity: str
    """Of its parameters: what else decides what it says."""
    load: Callable[[], Params]
    """Its parameters, laid out over the mesh; called only where something is to be computed."""
    mesh: Mesh
    vocab_size: int
    """Of which tokens: the first so many."""
    top_k: int
    """How many of the likeliest are kept."""
    temperature: float

    def beside(
        self,
        store: TokenStore,
        rows: TokenRows,
        packing: str,
        document_mask: bool,
        batch_size: int,
        report: Report = lambda phase, done, total: None,
    ) -> "TaughtRows":
        """The rows of a store with what the teacher says of them; computed now or before.

        What a run that was stopped has computed is kept, file by file.

        Args:
            store: that the rows are of.
            rows: as they are packed.
            packing, document_mask: how.
            batch_size: rows at once.
            report: told of progress, in rows.
        """
        folder = store.path / f"teacher_{self._fingerprint(packing, rows.seq_len, document_mask)}"
        blocks = [
            _Block(rows, first, min(first + ROWS_OF_FILE, len(rows)))
            for first in range(0, len(rows), ROWS_OF_FILE)
        ]
        missing = from_main(lambda: self._missing(folder, blocks))
        params = self.load() if missing else {}
        for number in missing:
            arrays = self._said(params, blocks[number], batch_size, report)
            if is_main():
                _write(_paths(folder, number), arrays)
        from_main(lambda: None)  # nobody reads before all is written
        files = [_opened(_paths(folder, number)) for number in range(len(blocks))]
        return TaughtRows(rows, files, self.top_k)

    def _missing(self, folder: Path, blocks: "Sequence[_Block]") -> list[int]:
        """The numbers of the files that are not there, or are broken."""
        missing = []
        for number, block in enumerate(blocks):
            shape = len(block), block.seq_len, self.top_k
            if any(_shape(path) != shape for path in _paths(folder, number)):
                missing.append(number)
        return missing

    def _said(
        self, params: Params, block: "_Block", batch_size: int, report: Report
    ) -> tuple[np.ndarray, np.ndarray]:
        """The arrays of a file."""
        wide = self.vocab_size > 2**16
        shape = len(block), block.seq_len, self.top_k
        ids, log_probs = np.zeros(shape, np.uint32 if wide else np.uint16), np.zeros(shape, "f2")
        with jax.set_mesh(self.mesh):
            batches = EvalBatches(block, batch_size, batch_sharding(self.mesh))
            for number, batch in enumerate(batches):
                begin = number * batch_size
                size = min(batch_size, len(block) - begin)
                found = _likeliest(
                    params,
                    {name: batch[name] for name in ("tokens", "positions", "segment_ids")},
                    model=self.model,
                    vocab_size=self.vocab_size,
                    k=self.top_k,
                    temperature=self.temperature,
                )
                for array, values in zip((ids, log_probs), found, strict=True):
                    array[begin : begin + size] = np.asarray(values)[:size]
                report("teacher", block.first + begin + size, len(block.rows))
        return ids, log_probs

    def _fingerprint(self, *layout: object) -> str:
        said = (self.vocab_size, self.top_k, self.temperature)
        parts = (_VERSION, self.identity, repr(self.model), said, layout)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class _OfRows:
    """What other rows are made of (`data.rows.TokenRows`), and have in common with them."""

    rows: TokenRows

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.rows.seq_len

    @property
    def fill_rate(self) -> float:
        """As of the rows alone."""
        return self.rows.fill_rate


@dataclasses.dataclass(frozen=True)
class TaughtRows(_OfRows):
    """Rows with what a teacher says of each place."""

    files: Sequence[tuple[np.ndarray, np.ndarray]]
    """Ids and log-probabilities of so many rows each."""
    top_k: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        file, place = divmod(index, ROWS_OF_FILE)
        ids, log_probs = self.files[file]
        return self._with(self.rows[index], ids[place], log_probs[place])

    def empty(self) -> Row:
        """A row of padding."""
        nothing = np.zeros((self.seq_len, self.top_k))
        return self._with(self.rows.empty(), nothing, nothing)

    @staticmethod
    def _with(row: Row, ids: np.ndarray, log_probs: np.ndarray) -> Row:
        told = {TEACHER_IDS: ids.astype(np.int32), TEACHER_LOG_PROBS: log_probs.astype(np.float32)}
        return row | told


@dataclasses.dataclass(frozen=True)
class _Block(_OfRows):
    """Some rows that follow each other, as rows."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.first + index]

    def empty(self) -> Row:
        return self.rows.empty()


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"ids_{number:05d}.npy", folder / f"log_probs_{number:05d}.npy"


def _opened(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    ids, log_probs = (np.load(path, mmap_mode="r").view(np.ndarray) for path in paths)
    return ids, log_probs


def _write(paths: Sequence[Path], arrays: Sequence[np.ndarray]) -> None:
    for path, array in zip(paths, arrays, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, array)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, buffer.getvalue())


def _shape(path: Path) -> tuple[int, ...]:
    """Of the array of a file; none where there is no file, or a broken one."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, EOFError, ValueError):
        return ()


@functools.partial(jax.jit, static_argnames=("model", "vocab_size", "k", "temperature"))
def _likeliest(
    params: Params,
    batch: Batch,
    *,
    model: TransformerConfig,
    vocab_size: int,
    k: int,
    temperature: float,
) -> tuple[Int[Array, "batch seq k"], Float[Array, "batch seq k"]]:
    output = Transformer(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    assert isinstance(output, Output)
    found = likeliest(output.hidden, output_head(model, params).first(vocab_size), k, temperature)
    # Whole in every process, each of which may have to read it.
    return jax.tree.map(constrain, found)
