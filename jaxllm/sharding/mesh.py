"""The device mesh: its axes, its configuration, and how a batch lies on it.

Axes, from the outside in: `data` replicates parameters and splits the batch; `fsdp` splits the
batch and the parameters (gathered layer by layer when used); `expert` splits the batch and the
experts of a mixture (all other parameters are replicated); `tensor` splits heads, the inner width
of the MLP and the vocabulary. Data parallelism alone is the default, and the program is the same
on one device.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxllm.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; the product must be the number of devices."""

    data: int = -1
    """Replicas of the parameters, each with its share of the batch; -1: all devices left over."""
    fsdp: int = 1
    """Shards of the parameters and of the batch (fully sharded data parallelism)."""
    expert: int = 1
    """Shards of the batch, and of the experts of a mixture (expert parallelism)."""
    tensor: int = 1
    """Shards of attention heads, MLP width and vocabulary (tensor parallelism)."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1 and value != -1:
                raise ValueError(f"{name}: must be positive, or -1 for all that is left over")
        if list(dataclasses.asdict(self).values()).count(-1) > 1:
            raise ValueError("data: only one axis of the mesh may be -1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `AXES` over `devices` (by default, all).

    Raises:
        UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // math.prod(size for size in shape if size != -1)
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"config.mesh: {wanted} does not fit {len(devices)} device(s); "
            "the product of the axes must be the number of devices."
        )
    if devices[0].platform == "tpu" and len(devices) == len(jax.devices()):
        grid = tpu_grid(shape, devices)
    else:  # devices of a process follow one another, so the inner axes lie within a process
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tpu_grid(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPU devices in `shape` (the sizes of `AXES`), along the torus of each slice.

    Slices, between which the network is slow, lie along `data`, and along `fsdp` where that has
    not enough.

    Raises:
        UserError: the two cannot be divided over the slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices)
    across = [math.gcd(shape[0], slices), 1, 1, 1]
    across[1] = slices // across[0]
    if shape[1] % across[1]:
        raise UserError(
            f"config.mesh: data {shape[0]} and fsdp {shape[1]} cannot be divided over {slices} "
            f"slices; make one of them a multiple of {slices}."
        )
    within = [size // parts for size, parts in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(array: Shaped[Array, "..."], *axes: str | tuple[str, ...] | None) -> Array:
    """Tells the compiler how an activation lies on the mesh in use; without one, nothing.

    Args:
        array: an activation inside a jitted function.
        *axes: for each leading dimension the mesh axis (or axes) that split it, or None.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))


def in_micro_batches(array: Shaped[Array, "..."], parts: int) -> Shaped[Array, "..."]:
    """[batch, ...] as [parts, batch / parts, ...]: part i takes the rows i, i + parts, ..., so that
    each device keeps its own."""
    split = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
    return constrain(jnp.moveaxis(split, 1, 0), None, BATCH_AXES)
