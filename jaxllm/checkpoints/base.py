"""A model that a run needs again: where it is, and whether it is the same.

A run that trains low-rank pairs keeps them alone, and of their base this in `base.json`; one that
is held to a reference has the same of that in `reference.json`, one that a reward model judges in
`judge.json`, and one that learns of a teacher in `teacher.json`:

    path, relative    where the model is, from the root and from the run's directory
    checksums         of each parameter rounded to bfloat16, whatever dtype it is held in
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.ops.checksum import checksum


class Role(NamedTuple):
    """What such a model is to the run."""

    file: str
    needs: str
    """What the run says of it where it is missing,"""
    told: str
    """and what it is called where another one stands in its place."""


BASE = Role(
    "base.json", "is an adapter, and its base", "the base that the adapter {} was trained beside"
)
REFERENCE = Role(
    "reference.json", "is held to a reference, which", "the reference that {} began with"
)
JUDGE = Role(
    "judge.json", "is judged by a reward model, which", "the reward model that {} began with"
)
TEACHER = Role("teacher.json", "learns of a teacher, which", "the teacher that {} began with")


def parameter_checksums(params: trees.Tree) -> dict[str, int]:
    """A checksum of each parameter by its path, whatever mesh it lies on."""
    sums = jax.device_get(_sums()(dict(params)))
    return {path: int(value) for path, value in trees.leaves_with_paths(sums)}


def record_base(
    run: RunDirectory, base: str | Path, checksums: dict[str, int], role: Role = BASE
) -> None:
    """Writes the role's file."""
    path = Path(base).resolve()
    relative = os.path.relpath(path, run.path.resolve())
    recorded = {"path": str(path), "relative": relative, "checksums": checksums}
    write_json(run.path / role.file, recorded)


def recorded_checksums(run: RunDirectory, role: Role) -> dict[str, int]:
    """Those that the run began with.

    Raises:
        UserError: nothing was recorded of it.
    """
    return _recorded(run, role)["checksums"]


def base_path(run: RunDirectory, role: Role = BASE) -> Path:
    """Where the base of an adapter's run is, or what else it needs again.

    Raises:
        UserError: it is not where it was, or nothing was recorded of it.
    """
    recorded = _recorded(run, role)
    places = (run.path / recorded["relative"], Path(recorded["path"]))
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{run.path}: {role.needs} is not at {recorded['path']} any more; put it back there."
    )


def place_of(run: RunDirectory, init: str, role: Role) -> str:
    """Where a model is that the run needs: `init`, or, in later lives, where it is found again.

    Raises:
        UserError: it is not where it was.
    """
    return str(base_path(run, role)) if (run.path / role.file).exists() else init


def check_base(
    run: RunDirectory, base: str | Path, checksums: dict[str, int], role: Role = BASE
) -> None:
    """Checks that parameters are those that the run's adapter was trained beside, or that it began
    with.

    Raises:
        UserError: they are not; the message says which differ.
    """
    before = recorded_checksums(run, role)
    differing = [path for path in before if checksums.get(path) != before[path]]
    differing += [path for path in checksums if path not in before]
    if differing:
        raise UserError(
            f"{base}: is not {role.told.format(run.path)}: "
            f"{len(differing)} of {len(before)} parameters differ, {differing[0]} among them."
        )


def _recorded(run: RunDirectory, role: Role) -> dict[str, Any]:
    path = run.path / role.file
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        fields = {"path": str, "relative": str, "checksums": dict}
        for name, kind in fields.items():
            if not isinstance(recorded[name], kind):
                raise ValueError(f"its {name} is a {type(recorded[name]).__name__}")
        return {name: recorded[name] for name in fields}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: what the run was trained beside cannot be read ({error})."
        ) from None


@functools.cache
def _sums() -> Any:
    return jax.jit(
        lambda params: jax.tree.map(lambda leaf: checksum(leaf.astype(jnp.bfloat16)), params)
    )
