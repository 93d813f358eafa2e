"""The reference that a policy is held to: log-probabilities of responses, computed once and kept
beside the token store:

    reference_FINGERPRINT/log_probs_00000.npy    float32: log π_ref(y) of each part of a shard
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxllm.data.batches import EvalBatches
from jaxllm.data.packing import PartValues, PlannedRows, packed_rows
from jaxllm.data.selection import Report
from jaxllm.data.store import TokenStore
from jaxllm.files import write_bytes_atomically
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Batch, Params
from jaxllm.objectives.responses import response_log_probs
from jaxllm.sharding.mesh import batch_sharding, constrain
from jaxllm.sharding.processes import from_main, is_main

NAME = "reference_log_probs"
"""Of the array that rows have of them."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model whose log-probabilities others are compared with."""

    model: TransformerConfig
    identity: str
    """Of its parameters: what else decides what it gives."""
    load: Callable[[], Params]
    """Its parameters, laid out over the mesh; called only where something is to be computed."""
    mesh: Mesh

    def of_store(
        self,
        store: TokenStore,
        packing: str,
        seq_len: int,
        batch_size: int,
        report: Report = lambda phase, done, total: None,
    ) -> Mapping[str, Sequence[PartValues]]:
        """log π_ref(y) of every response of a store, for `packed_rows`; computed now or before.

        Args:
            store: of rankings.
            packing: how they lie in rows while it is computed; of no matter for the result.
            seq_len: tokens of a row.
            batch_size: rows at once.
            report: told of progress, in rows.
        """
        folder = store.path / f"reference_{self._fingerprint}"
        paths = [folder / f"log_probs_{number:05d}.npy" for number in range(len(store.shards))]
        sizes = [len(store.parts(number)) for number in range(len(store.shards))]
        if from_main(lambda: _lengths(paths) == sizes):
            return {NAME: [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]}
        rows = packed_rows(store, packing, seq_len)
        assert isinstance(rows, PlannedRows)
        found = [np.zeros(size, np.float32) for size in sizes]
        with jax.set_mesh(self.mesh):
            for number, batch in enumerate(
                EvalBatches(rows, batch_size, batch_sharding(self.mesh))
            ):
                values = np.asarray(_log_probs(self._params, batch, model=self.model))
                first = number * batch_size
                for index in range(first, min(first + batch_size, len(rows))):
                    shard, parts = rows.parts_of(index)
                    found[shard][parts] = values[index - first, : len(parts)]
                report("reference", min(first + batch_size, len(rows)), len(rows))
        if is_main():
            for path, numbers in zip(paths, found, strict=True):
                buffer = io.BytesIO()
                np.save(buffer, numbers)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomically(path, buffer.getvalue())
        return {NAME: found}

    @functools.cached_property
    def _params(self) -> Params:
        return self.load()

    @property
    def _fingerprint(self) -> str:
        parts = (self.identity, repr(self.model))
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _lengths(paths: Sequence[Path]) -> list[int]:
    """How many numbers each of the files holds; 0 where there is none, or a broken one."""
    lengths = []
    for path in paths:
        try:
            lengths.append(len(np.load(path, mmap_mode="r")))
        except (OSError, EOFError, ValueError):
            lengths.append(0)
    return lengths


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(
    params: Params, batch: Batch, *, model: TransformerConfig
) -> Float[Array, "batch responses"]:
    # Whole in every process, each of which reads it.
    return constrain(response_log_probs(model, params, batch)[0])
