"""Reading rows of a table, with a gradient that is summed exactly enough."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "entries width"], ids: Int[Array, "..."], result_dtype: str
) -> Float[Array, "... width"]:
    """table[ids] in `result_dtype`; ids in [0, entries).

    The gradient of an entry is the sum over all places that read it, one added to the other:
    in bfloat16 that of a frequent token would soon stop growing. It is summed in float32,
    whatever the dtypes of table and result, and cast to that of the table once.
    """
    return jnp.take(table, ids, axis=0).astype(result_dtype)


def _forward(
    table: Float[Array, "entries width"], ids: Int[Array, "..."], result_dtype: str
) -> tuple[Float[Array, "... width"], tuple[Array, Array]]:
    return lookup(table, ids, result_dtype), (table, ids)


def _backward(
    result_dtype: str, saved: tuple[Array, Array], cotangent: Float[Array, "... width"]
) -> tuple[Float[Array, "entries width"], None]:
    del result_dtype
    table, ids = saved
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(cotangent.astype(jnp.float32))
    return total.astype(table.dtype), None


lookup.defvjp(_forward, _backward)
