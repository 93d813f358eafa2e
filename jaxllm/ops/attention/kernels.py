"""What the backends share that work on one device's part: sharding, padding, interpretation."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxllm.ops.attention.visibility import Places
from jaxllm.sharding.mesh import BATCH_AXES

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, Pallas kernels run step by step on any device: for tests, and very slow."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether Pallas kernels are to be interpreted, rather than compiled for their device."""
    return _interpreting.get()


def on_each_shard(
    attend: Callable[[Array, Array, Array, Places], Array],
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    places: Places,
) -> Float[Array, "batch seq heads value_dim"]:
    """Runs `attend` on each device's rows and heads of the mesh in use, without communication.

    Rows lie over `BATCH_AXES` and heads over `tensor`; where the mesh does not divide them, every
    device computes them all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(query, key, value, places)
    heads, kv_heads, tensor = query.shape[2], key.shape[2], mesh.shape["tensor"]
    row_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    row_axes = None if query.shape[0] % row_shards else BATCH_AXES
    head_axis = None if heads % tensor else "tensor"
    if head_axis and kv_heads % tensor:  # as many copies as give each device whole key heads
        copies = math.lcm(kv_heads, tensor) // kv_heads
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    by_head = PartitionSpec(row_axes, None, head_axis, None)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(row_axes)),
        out_specs=by_head,
        check_vma=False,  # pallas_call and custom_vjp do not say along which axes results vary
    )(query, key, value, places)


def padded(
    x: Shaped[Array, "..."], multiple: int, axis: int = 1, fill: int | str = 0
) -> Shaped[Array, "..."]:
    """`x` made longer along `axis`, to a multiple, with the number `fill` or its `"edge"`."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if here == axis else 0) for here in range(x.ndim)]
    if fill == "edge":
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=fill)
