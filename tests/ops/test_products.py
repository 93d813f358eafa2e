"""Matrix products: their values, gradients and dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.products import product


def inputs(dtype="float32"):
    x, kernel, cotangent = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3), [(2, 5, 3), (3, 4), (2, 5, 4)], strict=True
        )
    )
    return x.astype(dtype), kernel, cotangent.astype(dtype)


def test_values_and_gradients_are_those_of_a_plain_product():
    x, kernel, cotangent = inputs()
    found, pull = jax.vjp(product, x, kernel)
    expected, plain_pull = jax.vjp(jnp.matmul, x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(pull(cotangent), plain_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def operands(function, *arguments):
    """The dtypes of operands and results of all products of a program."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert products
    return [
        (set(re.findall(r"x([a-z]+\d+)>", operands)), *re.findall(r"x([a-z]+\d+)>", result))
        for operands, result in products
    ]


@pytest.mark.parametrize("result", ["", "float32"])
@pytest.mark.parametrize("reduction", ["float32", "bfloat16"])
def test_operands_are_narrow_in_both_passes_and_sums_as_asked(result, reduction):
    x, kernel, _ = inputs("bfloat16")

    def total(x, kernel):
        return jnp.sum(jnp.sin(product(x, kernel, result, reduction).astype(jnp.float32)))

    found = operands(jax.value_and_grad(total, (0, 1)), x, kernel)
    assert len(found) == 3
    assert all(inside == {"bf16"} for inside, _ in found)
    short = {"float32": "f32", "bfloat16": "bf16", "": "bf16"}
    assert sorted(out for _, out in found) == sorted(["bf16", short[result], short[reduction]])
    of_x, of_kernel = jax.grad(total, (0, 1))(x, kernel)
    assert (of_x.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)


def test_many_small_gradients_are_summed_in_float32():
    # 4096 times 2^-8: summed in bfloat16 one by one, they would stop growing at 2.
    x = jnp.ones((4096, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: jnp.sum(product(x, k).astype(jnp.float32)) * 2**-8)(
        jnp.ones((1, 1))
    )
    np.testing.assert_allclose(gradient, [[16.0]])
