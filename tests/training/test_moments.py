"""Moments in bfloat16: half the memory, and right in the mean; and where they lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.training.moments import moment_shardings
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer

PARAMS = {
    "embedding": jnp.ones((6, 4)),
    "stack_0": {"mlp": {"kernel": jnp.ones((3, 4, 4))}, "norm": {"scale": jnp.ones((3, 4))}},
}


def state_bytes(params, **options):
    shapes = jax.eval_shape(make_optimizer(OptimizerConfig(**options)).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_halves_the_state_whatever_the_parameters(name, param_dtype):
    params = optax.tree.cast(PARAMS, param_dtype)
    whole = state_bytes(params, name=name)
    assert state_bytes(params, name=name, moment_dtype="bfloat16") == whole / 2
    moments = {"adamw": 2, "lion": 1}.get(name)
    if moments:
        assert whole == moments * 4 * (24 + 48 + 12)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_what_is_not_a_moment_stays_as_it_is(name):
    narrow = make_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"))
    wide = make_optimizer(OptimizerConfig(name=name))
    for found, wanted in zip(
        jax.tree.leaves(narrow.init(PARAMS)), jax.tree.leaves(wide.init(PARAMS)), strict=True
    ):
        if found.ndim < 2:
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


def test_a_slow_second_moment_in_bfloat16_follows_the_one_in_float32():
    """It falls by a thousandth a step, less than bfloat16 can tell: to the nearest, not at all."""
    params = {"kernel": jnp.zeros((64, 64))}
    config = {"beta2": 0.999, "clip_norm": 0.0}
    narrow = make_optimizer(OptimizerConfig(moment_dtype="bfloat16", **config))
    wide = make_optimizer(OptimizerConfig(**config))
    draw = jax.random.normal

    def step(states, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        size = jnp.where(number < 100, 1.0, 0.1)
        gradients = {"kernel": size * draw(key, (64, 64))}
        ours, theirs, nearest = states
        directions, ours = narrow.update(gradients, ours, params, key=key)
        expected, theirs = wide.update(gradients, theirs, params, key=key)
        change = 0.999 * nearest + 0.001 * jnp.square(gradients["kernel"])
        ratio = jnp.linalg.norm(directions["kernel"]) / jnp.linalg.norm(expected["kernel"])
        return (ours, theirs, change.astype(jnp.bfloat16)), ratio

    begin = narrow.init(params), wide.init(params), jnp.zeros((64, 64), jnp.bfloat16)
    (ours, theirs, nearest), ratios = jax.jit(
        lambda states: jax.lax.scan(step, states, jnp.arange(700))
    )(begin)
    (found,), (wanted,) = (jax.tree.leaves(state[1].nu) for state in (ours, theirs))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.mean(found), jnp.mean(wanted), rtol=0.02)
    assert abs(float(jnp.mean(nearest) / jnp.mean(wanted)) - 1) > 0.3
    np.testing.assert_allclose(ratios, 1, atol=0.05)


def test_moments_lie_as_the_axes_of_their_parameter_that_they_have():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = {
        "kernel": P(None, None, "fsdp", "tensor"),
        "square": P(None, "fsdp"),
        "scale": P("tensor"),
    }

    def tree(kernel, square, scale):
        sizes = {"kernel": kernel, "square": square, "scale": scale}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}

    params = tree((3, 4, 8, 16), (3, 8, 8), (8,))
    state = optax.FactoredState(
        count=jax.ShapeDtypeStruct((), jnp.int32),
        v_row=tree((3, 4, 8), (3, 8), (1,)),
        v_col=tree((3, 4, 16), (3, 8), ()),
        v=params,
    )
    by_param = shardings(params, list(rules.items()), mesh)
    found = jax.tree.map(lambda s: s.spec, moment_shardings(state, params, by_param, mesh))
    assert found.count == P()
    assert found.v == rules
    assert found.v_row == {"kernel": P(None, None, "fsdp"), "square": P(None, "fsdp"), "scale": P()}
    assert found.v_col["kernel"] == P(None, None, "tensor")
    assert found.v_col["scale"] == P()
