"""Grouped matrix products: rows sorted by group, each times the kernel of its group.

XLA has such a product on a TPU alone: on a CPU, and on most GPUs, `jax.lax.ragged_dot` becomes
one dense product over all groups, whose time and memory grow with their number. There the rows
are multiplied in blocks instead, in loops that run over the blocks and groups that have rows: so
the work follows the rows, an idle group costs nothing, and a busy one loses none.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Bool, Float, Int

# A block of fewer rows wastes less at the end of a group, one of more multiplies faster.
_MIN_BLOCK, _MAX_BLOCK = 8, 256


def grouped_matmul(
    rows: Float[Array, "rows in"],
    kernels: Float[Array, "groups in out"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "rows out"]:
    """Multiplies each row by the kernel of its group: row i of group g gives rows[i] @ kernels[g].

    Operands have the dtype of `rows` forward and backward, and products accumulate in float32.
    The result has that dtype too; the gradient of the kernels has theirs, without having been
    rounded to that of `rows`.

    Args:
        rows: those of group 0 first, then those of group 1, and so on.
        kernels: a matrix for each group, of any floating dtype.
        sizes: how many rows each group has; what is left at the end of `rows` belongs to no
            group and gives zeros.
    """
    return _grouped_matmul(rows, kernels, sizes, str(kernels.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(rows: Array, kernels: Array, sizes: Array, gradient_dtype: str) -> Array:
    """`grouped_matmul`; `gradient_dtype` is the dtype of `kernels`, which are not kept."""
    return _forward(rows, kernels, sizes, gradient_dtype)[0]


def _forward(
    rows: Array, kernels: Array, sizes: Array, gradient_dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    del gradient_dtype
    kernels = kernels.astype(rows.dtype)
    return _product(rows, kernels, sizes, transposed=False), (rows, kernels, sizes)


def _backward(
    gradient_dtype: str, saved: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    rows, kernels, sizes = saved
    # What a TPU and other platforms compute is two programs; only one of them is compiled.
    by_kernel = jax.lax.platform_dependent(
        rows,
        cotangent,
        sizes,
        tpu=partial(native_outer, dtype=gradient_dtype),
        default=partial(blocked_outer, dtype=gradient_dtype),
    )
    return _product(cotangent, kernels, sizes, transposed=True), by_kernel, None


_grouped_matmul.defvjp(_forward, _backward)


def _product(rows: Array, kernels: Array, sizes: Array, *, transposed: bool) -> Array:
    return jax.lax.platform_dependent(
        rows,
        kernels,
        sizes,
        tpu=partial(native_product, transposed=transposed),
        default=partial(blocked_product, transposed=transposed),
    )


def native_product(
    rows: Float[Array, "rows _"],
    kernels: Float[Array, "groups _ _"],
    sizes: Int[Array, " groups"],
    *,
    transposed: bool,
) -> Float[Array, "rows _"]:
    """The grouped product, or that with the transposed kernels, as one XLA operation."""
    dimensions = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = jax.lax.ragged_dot_general(rows, kernels, sizes, dimensions)
    # A kernel for an accelerator may leave the rows of no group as it found them.
    grouped = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], out, 0)


def native_outer(
    rows: Float[Array, "rows in"],
    cotangent: Float[Array, "rows out"],
    sizes: Int[Array, " groups"],
    *,
    dtype: str,
) -> Float[Array, "groups in out"]:
    """For each group rowsᵀ @ cotangent over its rows, in `dtype`, as one XLA operation."""
    dimensions = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        rows, cotangent, sizes, dimensions, preferred_element_type=jnp.dtype(dtype)
    )


def blocked_product(
    rows: Float[Array, "rows _"],
    kernels: Float[Array, "groups _ _"],
    sizes: Int[Array, " groups"],
    *,
    transposed: bool,
) -> Float[Array, "rows _"]:
    """The grouped product, or that with the transposed kernels, a block of rows at a time."""
    block = block_length(rows.shape[0], sizes.shape[0])
    busy, ends = _busy(sizes), jnp.cumsum(sizes)

    def one_group(index: Int[Array, ""], out: Array) -> Array:
        group = busy[index]
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)

        def one_block(block_index: Int[Array, ""], out: Array) -> Array:
            start, inside = _place(block_index, block, ends[group], sizes[group], rows.shape[0])
            product = jax.lax.dot_general(
                jax.lax.dynamic_slice_in_dim(rows, start, block),
                kernel,
                (((1,), (1 if transposed else 0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            others = jax.lax.dynamic_slice_in_dim(out, start, block)
            written = jnp.where(inside[:, None], product.astype(out.dtype), others)
            return jax.lax.dynamic_update_slice_in_dim(out, written, start, axis=0)

        return jax.lax.fori_loop(0, -(-sizes[group] // block), one_block, out)

    width = kernels.shape[1 if transposed else 2]
    out = jnp.zeros((rows.shape[0], width), rows.dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), one_group, out)


def blocked_outer(
    rows: Float[Array, "rows in"],
    cotangent: Float[Array, "rows out"],
    sizes: Int[Array, " groups"],
    *,
    dtype: str,
) -> Float[Array, "groups in out"]:
    """For each group rowsᵀ @ cotangent over its rows, in `dtype`, a block of them at a time."""
    block = block_length(rows.shape[0], sizes.shape[0])
    busy, ends = _busy(sizes), jnp.cumsum(sizes)
    shape = (rows.shape[1], cotangent.shape[1])

    def one_group(index: Int[Array, ""], out: Array) -> Array:
        group = busy[index]

        def one_block(block_index: Int[Array, ""], total: Array) -> Array:
            start, inside = _place(block_index, block, ends[group], sizes[group], rows.shape[0])
            return total + jax.lax.dot_general(
                jnp.where(inside[:, None], jax.lax.dynamic_slice_in_dim(rows, start, block), 0),
                jax.lax.dynamic_slice_in_dim(cotangent, start, block),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        blocks = -(-sizes[group] // block)
        total = jax.lax.fori_loop(0, blocks, one_block, jnp.zeros(shape, jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), group, axis=0)

    out = jnp.zeros((sizes.shape[0], *shape), dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), one_group, out)


def block_length(rows: int, groups: int) -> int:
    """Rows of a block: a power of two about half of what a group has, if all have the same."""
    half = max(1, rows // (2 * groups))
    return min(rows, max(_MIN_BLOCK, min(_MAX_BLOCK, 1 << (half - 1).bit_length())))


def _busy(sizes: Int[Array, " groups"]) -> Int[Array, " groups"]:
    """The groups that have rows, in order, before those that have none."""
    return jnp.argsort(sizes == 0, stable=True)


def _place(
    block_index: Int[Array, ""],
    block: int,
    end: Int[Array, ""],
    size: Int[Array, ""],
    rows: int,
) -> tuple[Int[Array, ""], Bool[Array, " block"]]:
    """The first row of a group's block, and which of its rows no other block has.

    The last block reaches into the rows of the next group. At the end of all rows, where that
    is impossible, it is moved back over rows that an earlier block has.
    """
    first = end - size + block_index * block
    start = jnp.minimum(first, rows - block)
    row = start + jnp.arange(block)
    return start, (first <= row) & (row < end)
