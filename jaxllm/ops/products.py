"""Matrix products whose precision is chosen for each pass, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PRODUCT = "product"
"""Name of what `model.remat=dots` keeps for the backward pass: the results of products, or what
is made of them at once where the products themselves are not needed."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: Float[Array, "... in"],
    kernel: Float[Array, "in out"],
    result_dtype: str = "",
    reduction_dtype: str = "float32",
) -> Float[Array, "... out"]:
    """x @ kernel in the dtype of x, summed in float32.

    Differentiated by JAX itself, a bfloat16 product with a float32 result would multiply
    float32 cotangents backward, and one with a bfloat16 result would round the gradient of the
    kernel before it is summed over devices. Here operands have the dtype of `x` in every product.

    Args:
        x: activations; the kernel is cast to their dtype.
        kernel: a matrix, of any floating dtype, which its gradient has too.
        result_dtype: of the result; empty: that of `x`.
        reduction_dtype: in which the gradient of the kernel is summed over tokens and devices.
    """
    return jnp.matmul(
        x, kernel.astype(x.dtype), preferred_element_type=jnp.dtype(result_dtype or x.dtype)
    )


def _forward(
    x: Float[Array, "... in"], kernel: Float[Array, "in out"], result_dtype: str, reduction: str
) -> tuple[Float[Array, "... out"], tuple[Array, Array]]:
    return product(x, kernel, result_dtype, reduction), (x, kernel)


def _backward(
    result_dtype: str,
    reduction_dtype: str,
    saved: tuple[Array, Array],
    cotangent: Float[Array, "... out"],
) -> tuple[Float[Array, "... in"], Float[Array, "in out"]]:
    del result_dtype
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    of_x = jnp.einsum("...o,io->...i", cotangent, kernel.astype(x.dtype))
    # XLA turns the first operand, on a CPU in memory: that had better be the narrow one.
    turned = x.shape[-1] > cotangent.shape[-1]
    tokens = tuple(range(x.ndim - 1))
    of_kernel = jax.lax.dot_general(
        cotangent if turned else x,
        x if turned else cotangent,
        ((tokens, tokens), ((), ())),
        preferred_element_type=jnp.dtype(reduction_dtype),
    )
    if turned:
        of_kernel = apart(of_kernel).T
    return of_x, of_kernel.astype(kernel.dtype)


def apart(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, which stands between a product and a transposition of its operand or result.

    XLA would fold the transposition into the product, and on a CPU take another library for that,
    which is slower than to transpose in memory (docs/performance.md).
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


product.defvjp(_forward, _backward)
