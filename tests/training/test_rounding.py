"""Stochastic rounding: right in the mean, exact where it can be, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.rounding import stochastic_round

KEY = jax.random.key(0)
MANY = 40_000


def rounded(values, key=KEY):
    return stochastic_round(values, jnp.zeros_like(values, jnp.bfloat16), key)


@pytest.mark.parametrize("value", [1 + 2**-9, -1 - 2**-10, 3.0001, 1e-20 / 3, -7e30])
def test_a_value_goes_to_one_of_its_neighbours_and_is_kept_in_the_mean(value):
    found = np.asarray(rounded(jnp.full(MANY, value)), np.float64)
    wanted = float(np.float32(value))
    low, high = np.unique(found)
    assert low < wanted < high
    assert (high - low) / abs(wanted) <= 2**-7
    deviation = (high - low) / 2 / MANY**0.5
    assert abs(found.mean() - wanted) < 4 * deviation


def test_what_bfloat16_can_hold_stays_as_it_is():
    exact = jnp.array([0.0, -0.0, 1.0, -2.5, 2.0**-130, jnp.inf, -jnp.inf, jnp.nan, 3e38])
    exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jnp.append(exact, jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32))
    for seed in range(20):
        found = rounded(exact, jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(found, np.float32), exact)
        np.testing.assert_array_equal(np.signbit(np.asarray(found[:2], np.float32)), [False, True])


def test_leaves_that_need_no_rounding_are_left_alone_and_others_draw_for_themselves():
    third = jnp.full(100, 1 / 3)
    tree = {"a": third, "b": third, "kept": third, "count": jnp.int32(7)}
    narrow = third.astype(jnp.bfloat16)
    found = stochastic_round(tree, tree | {"a": narrow, "b": narrow}, KEY)
    assert found["kept"] is third
    assert found["count"] is tree["count"]
    assert (found["a"] != found["b"]).any()
    again = stochastic_round(tree, tree | {"a": narrow, "b": narrow}, KEY)
    np.testing.assert_array_equal(found["a"], again["a"])


def test_a_mesh_rounds_as_one_device_does():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    values = jax.random.normal(KEY, (16, 32))
    layout = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    found = jax.jit(rounded)(jax.device_put(values, layout))
    assert found.sharding.is_equivalent_to(layout, 2)
    np.testing.assert_array_equal(jax.device_get(found), jax.device_get(jax.jit(rounded)(values)))
