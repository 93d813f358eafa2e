"""What differs between two runs: lines of `metrics.jsonl` and the last checkpoint, clocks aside."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from moments import committed

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics

CLOCK = ("time", "goodput/", "train/tokens_per_second", "train/data_wait_share", "train/mfu")
"""Beginnings of what a metrics line says of the clock: what two equal runs may differ in."""


def differences(reference: RunDirectory, run: RunDirectory, tolerance: float = 0.0) -> list[str]:
    """What differs, a line each; empty if nothing does.

    Loss and norm of the gradient see every batch, so that equal lines mean equal batches.

    Args:
        reference, run: runs of one configuration, at their ends.
        tolerance: difference allowed between scalars, and between arrays in the norm, relative to
            the reference's (of a scalar below `tolerance`, relative to that); 0: every bit must be
            the same.
    """
    lines = [read_metrics(one.metrics) for one in (reference, run)]
    found = [
        f"metrics.jsonl:{number}: {first} against {second}"
        for number, (first, second) in enumerate(itertools.zip_longest(*lines), start=1)
        if first is None or second is None or not _same_line(first, second, tolerance)
    ]
    steps = [max(committed(one), default=0) for one in (reference, run)]
    if steps[0] != steps[1]:
        return [*found, f"last checkpoint: {steps[0]} against {steps[1]}"]
    for item in ("params", "progress"):
        arrays = [_arrays(one.checkpoints / str(steps[0]) / item) for one in (reference, run)]
        for path in {**arrays[0], **arrays[1]}:
            first, second = (tree.get(path) for tree in arrays)
            if first is None or second is None or not _same(first, second, tolerance):
                found.append(f"checkpoint {steps[0]}: {item}{path} differs")
    return found


def _same_line(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> bool:
    first, second = (
        {name: value for name, value in line.items() if not name.startswith(CLOCK)}
        for line in (first, second)
    )
    return first.keys() == second.keys() and all(
        one == second[name]
        or (math.isnan(one) and math.isnan(second[name]))
        # Near 0 stand differences of larger numbers, whose rounding they have.
        or abs(one - second[name]) <= tolerance * max(abs(one), tolerance)
        for name, one in first.items()
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an item of a checkpoint, on whatever devices they were."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.resolve()).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(
            path.resolve(), args=ocp.args.PyTreeRestore(restore_args=kinds)
        )
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _same(first: np.ndarray, second: np.ndarray, tolerance: float) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.tobytes() == second.tobytes():
        return True
    apart = np.linalg.norm(first.astype(np.float64) - second.astype(np.float64))
    return bool(apart <= tolerance * np.linalg.norm(first.astype(np.float64)))
