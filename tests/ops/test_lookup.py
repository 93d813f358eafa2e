"""Reading rows of a table: values, and how the gradient is summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.lookup import lookup


def test_values_and_gradients_are_those_of_plain_indexing():
    table = jax.random.normal(jax.random.key(0), (5, 3))
    ids = jnp.array([[4, 0, 0], [2, 4, 4]])
    cotangent = jax.random.normal(jax.random.key(1), (2, 3, 3))
    found, pull = jax.vjp(lambda table: lookup(table, ids, "float32"), table)
    expected, plain_pull = jax.vjp(lambda table: table[ids], table)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(pull(cotangent)[0], plain_pull(cotangent)[0], rtol=1e-6)


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("result", ["float32", "bfloat16"])
def test_many_small_gradients_of_one_entry_are_summed_in_float32(params, result):
    # 4096 times 2^-8: summed in bfloat16 one by one, they would stop growing at 2.
    ids = jnp.zeros(4096, int)

    def total(table):
        rows = lookup(table, ids, result)
        assert rows.dtype == jnp.dtype(result)
        return jnp.sum(rows.astype(jnp.float32)) * 2**-8

    gradient = jax.grad(total)(jnp.ones((2, 1), params))
    assert gradient.dtype == jnp.dtype(params)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[16.0], [0.0]])
