"""Whether the copies of each parameter on different devices are still the same, bit for bit.

They are as long as devices compute right: every copy is updated by the same program from the same
gradient. One that differs is a faulty device or memory, or a fault of the program, and makes a
model that nobody can make again.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from jaxllm import trees
from jaxllm.errors import Preempted
from jaxllm.objectives.objective import Params
from jaxllm.ops.checksum import checksum

_NAMED = 3
_LISTED = 8


class ReplicasDiffer(Preempted):
    """Copies of a parameter differ; the run can go on from its last checkpoint: code 75."""


class _Laid(NamedTuple):
    """A parameter on a mesh."""

    path: str
    array: jax.Array
    sharding: NamedSharding


def check_replicas(params: Params) -> None:
    """Compares all copies of each part of each parameter, over the devices of all processes.

    Every process must call it at the same step, and gets the same answer. Each device reads its
    part of the parameters once; 4 bytes a parameter and device are exchanged.

    Args:
        params: arrays laid over a mesh by `NamedSharding`; those on one device have no copies.

    Raises:
        ReplicasDiffer: some differ; the message names parameters, devices and processes.
    """
    by_mesh: dict[Mesh, list[_Laid]] = {}
    for path, array in trees.leaves_with_paths(params):
        sharding = array.sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1:
            by_mesh.setdefault(mesh, []).append(_Laid(path, array, sharding))
    differences = [
        difference
        for mesh, arrays in by_mesh.items()
        for laid, sums in zip(arrays, _checksums(mesh, arrays).T, strict=True)
        if (difference := _difference(laid, mesh, sums))
    ]
    if differences:
        more = len(differences) - _NAMED
        raise ReplicasDiffer(
            "copies of parameters that must be equal differ, so a device or its memory is at "
            f"fault: {'; '.join(differences[:_NAMED])}"
            f"{f'; and {more} more parameters' if more > 0 else ''}. Run the same command again "
            "to go on from the last checkpoint; if they differ again, do without that device.",
            together=True,
        )


def _checksums(mesh: Mesh, arrays: Sequence[_Laid]) -> UInt32[np.ndarray, "devices arrays"]:
    """Of what each device of the mesh holds of each array."""
    program = _program(mesh, tuple(laid.sharding.spec for laid in arrays))
    return np.asarray(program(*(laid.array for laid in arrays)))


@functools.lru_cache(maxsize=8)
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.stages.Wrapped:
    """The jitted program of `_checksums`, made once for parameters laid out alike."""

    def local(*shards: Array) -> Array:
        sums = jnp.stack([checksum(shard) for shard in shards])
        return jax.lax.all_gather(sums, mesh.axis_names)

    # What is replicated by its sharding is what is in doubt here, so nothing may follow from it.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(mapped)


def _difference(laid: _Laid, mesh: Mesh, sums: UInt32[np.ndarray, "devices"]) -> str:
    """Which devices of the mesh disagree on a part of the array; empty where none do."""
    first = _first_holders(mesh, laid.sharding, laid.array.shape)
    differing = np.flatnonzero(sums != sums[first])
    if not differing.size:
        return ""
    by_value: dict[int, list[jax.Device]] = {}
    for place in np.flatnonzero(first == first[differing[0]]):
        by_value.setdefault(int(sums[place]), []).append(mesh.devices.flat[place])
    # The most come first: where they are more than half, they are right.
    groups = sorted(by_value.values(), key=len, reverse=True)
    return f"{laid.path} on {' against '.join(map(_names, groups))}"


@functools.lru_cache(maxsize=1024)
def _first_holders(
    mesh: Mesh, sharding: NamedSharding, shape: tuple[int, ...]
) -> Int[np.ndarray, "devices"]:
    """For each place in the mesh the first one that holds the same part of the array."""
    held = sharding.devices_indices_map(shape)
    first: dict[str, int] = {}
    return np.array(
        [
            first.setdefault(str(held[device]), place)
            for place, device in enumerate(mesh.devices.flat)
        ]
    )


def _names(devices: Sequence[jax.Device]) -> str:
    listed = ", ".join(
        f"{device.id} (process {device.process_index})" for device in devices[:_LISTED]
    )
    more = len(devices) - _LISTED
    return f"device {listed}{f' and {more} more' if more > 0 else ''}"
