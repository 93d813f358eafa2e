"""The base of an adapter: where the model it was trained beside is, and whether it is the same.


A run that trains low-rank pairs keeps them alone, and of their base this in `base.json`:

    path, relative    where the base is, from the root and from the run's directory
    checksums         of each parameter rounded to bfloat16, whatever dtype it is held in
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.ops.checksum import checksum


def parameter_checksums(params: trees.Tree) -> dict[str, int]:
    """A checksum of each parameter by its path, whatever mesh it lies on."""
    sums = jax.device_get(_sums()(dict(params)))
    return {path: int(value) for path, value in trees.leaves_with_paths(sums)}


def record_base(run: RunDirectory, base: str | Path, checksums: dict[str, int]) -> None:
    """Writes `base.json`."""
    path = Path(base).resolve()
    relative = os.path.relpath(path, run.path.resolve())
    write_json(run.base, {"path": str(path), "relative": relative, "checksums": checksums})


def base_path(run: RunDirectory) -> Path:
    """Where the base of an adapter's run is.

    Raises:
        UserError: it is not where it was, or nothing was recorded of it.
    """
    recorded = _recorded(run)
    places = (run.path / recorded["relative"], Path(recorded["path"]))
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{run.path}: is an adapter, and its base is not at {recorded['path']} any more; put it "
        "back there."
    )


def check_base(run: RunDirectory, base: str | Path, checksums: dict[str, int]) -> None:
    """Checks that parameters are those that the run's adapter was trained beside.

    Raises:
        UserError: they are not; the message says which differ.
    """
    before = _recorded(run)["checksums"]
    differing = [path for path in before if checksums.get(path) != before[path]]
    differing += [path for path in checksums if path not in before]
    if differing:
        raise UserError(
            f"{base}: is not the base that the adapter {run.path} was trained beside: "
            f"{len(differing)} of {len(before)} parameters differ, {differing[0]} among them."
        )


def _recorded(run: RunDirectory) -> dict[str, Any]:
    try:
        recorded = json.loads(run.base.read_text(encoding="utf-8"))
        fields = {"path": str, "relative": str, "checksums": dict}
        for name, kind in fields.items():
            if not isinstance(recorded[name], kind):
                raise ValueError(f"its {name} is a {type(recorded[name]).__name__}")
        return {name: recorded[name] for name in fields}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.base}: what the adapter was trained beside cannot be read ({error})."
        ) from None


@functools.cache
def _sums() -> Any:
    return jax.jit(
        lambda params: jax.tree.map(lambda leaf: checksum(leaf.astype(jnp.bfloat16)), params)
    )
