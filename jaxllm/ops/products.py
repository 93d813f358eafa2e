"""Matrix products whose precision is chosen for each pass, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

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
    return of_x, _of_matrix(x, cotangent, reduction_dtype).astype(kernel.dtype)


def _of_matrix(
    x: Float[Array, "... in"], cotangent: Float[Array, "... out"], reduction_dtype: str
) -> Float[Array, "in out"]:
    """The gradient of the matrix of a product, summed over tokens."""
    # XLA turns the first operand, on a CPU in memory: that had better be the narrow one.
    turned = x.shape[-1] > cotangent.shape[-1]
    tokens = tuple(range(x.ndim - 1))
    of_matrix = jax.lax.dot_general(
        cotangent if turned else x,
        x if turned else cotangent,
        ((tokens, tokens), ((), ())),
        preferred_element_type=jnp.dtype(reduction_dtype),
    )
    return apart(of_matrix).T if turned else of_matrix


def apart(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, which stands between a product and a transposition of its operand or result.

    XLA would fold the transposition into the product, and on a CPU take another library for that,
    which is slower than to transpose in memory (docs/performance.md).
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def adapted_product(
    x: Float32[Array, "... in"],
    kernel: Float[Array, "in out"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    scale: Float[Array, ""],
    reduction_dtype: str = "float32",
) -> Float32[Array, "... out"]:
    """x @ (kernel + scale · a @ b), as one product, in float32.

    The thin products that x @ kernel + scale · (x @ a) @ b takes beside the large one read and
    write every activation once more, forward and backward, which on a CPU costs more than to add
    up the matrices. What differs is the rounding. `scale` is never trained: its gradient is told
    to be zero.
    """
    return jnp.matmul(x, _whole(kernel, a, b, scale))


def _whole(kernel: Array, a: Array, b: Array, scale: Array) -> Float32[Array, "in out"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return kernel.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")


def _adapted_forward(
    x: Array, kernel: Array, a: Array, b: Array, scale: Array, reduction_dtype: str
) -> tuple[Array, tuple[Array, ...]]:
    found = adapted_product(x, kernel, a, b, scale, reduction_dtype)
    return found, (x, kernel, a, b, scale)


def _adapted_backward(
    reduction_dtype: str, saved: tuple[Array, ...], cotangent: Array
) -> tuple[Array, ...]:
    x, kernel, a, b, scale = saved
    of_x = jnp.einsum("...o,io->...i", cotangent, _whole(kernel, a, b, scale))
    of_thin = scale * jnp.einsum("...o,ro->...r", cotangent, b.astype(x.dtype))
    thin = scale * jnp.matmul(x, a.astype(x.dtype))
    return (
        of_x,
        # Left out of the program where the kernel is frozen.
        _of_matrix(x, cotangent, reduction_dtype).astype(kernel.dtype),
        _of_matrix(x, of_thin, reduction_dtype).astype(a.dtype),
        _of_matrix(thin, cotangent, reduction_dtype).astype(b.dtype),
        jnp.zeros_like(scale),
    )


adapted_product.defvjp(_adapted_forward, _adapted_backward)
