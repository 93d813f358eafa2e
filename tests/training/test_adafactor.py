"""Adafactor against Optax's, matrix by matrix: nothing is shared over layers and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm import trees
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.step import init_state, state_shapes

SHAPES = {
    "embedding": (192, 128),
    "position_embedding": (160, 128),
    "stack_0": {
        "attention": {"kernel": (2, 128, 160), "bias": (200, 160)},
        "experts": {"kernel": (2, 2, 128, 144)},
        "norm": {"scale": (200, 128)},
        "small": {"kernel": (2, 64, 128)},
    },
}
CONFIG = OptimizerConfig(name="adafactor", weight_decay=0.0, clip_norm=0.0)


@pytest.fixture(scope="module")
def gradients():
    """Two steps' gradients, each layer's of another size."""

    rng = np.random.default_rng(0)

    def draw(path, shape):
        sizes = np.exp(2 * rng.standard_normal((2, *shape[:-1], 1)))
        return (sizes * rng.standard_normal((2, *shape))).astype(np.float32)

    return trees.map_with_paths(draw, SHAPES)


@pytest.fixture(scope="module")
def updated(gradients):
    """The directions of the second step, and the state after it."""
    optimizer = make_optimizer(CONFIG)
    params = jax.tree.map(lambda leaf: leaf[0], gradients)

    @jax.jit
    def run(gradients):
        state = optimizer.init(params)
        for step in range(2):
            now = jax.tree.map(lambda leaf, step=step: leaf[step], gradients)
            directions, state = optimizer.update(now, state, params)
        return directions, state

    return run(gradients)


def test_every_matrix_and_vector_moves_as_by_optax_alone(gradients, updated):
    alone = optax.adafactor(multiply_by_parameter_scale=False)
    update = jax.jit(alone.update)
    directions = dict(trees.leaves_with_paths(updated[0]))
    for path, leaf in trees.leaves_with_paths(gradients):
        vector = path.endswith(("scale", "bias"))
        for index in ((0,), (1,)) if vector else ((0, 1), (1, 0)):
            index = index[: leaf.ndim - (2 if vector else 3)]  # of the layer, and of the expert
            param = leaf[(0, *index)]
            state = alone.init(param)
            for step in range(2):
                expected, state = update(leaf[(step, *index)], state, param)
            np.testing.assert_allclose(directions[path][index], -expected, rtol=2e-3, atol=1e-5)


def test_matrices_are_kept_as_rows_and_columns():
    # As many layers and experts as a factored axis must have: the two largest axes are not
    # always those of a matrix.
    stacks = {"kernel": (150, 3, 128, 160), "experts": {"kernel": (2, 500, 128, 160)}}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        SHAPES | {"stack_1": stacks},
        is_leaf=lambda node: isinstance(node, tuple),
    )
    state = jax.eval_shape(make_optimizer(CONFIG).init, params)[1]

    def kept(path):
        factored = functools.reduce(lambda tree, name: tree[name], path.split("/"), state)[0]
        moments = (factored.v_row, factored.v_col, factored.v)
        assert {moment.dtype for moment in moments} == {jnp.dtype("float32")}
        return sorted(moment.shape for moment in moments if moment.shape[-1] != 1)

    assert kept("embedding") == [(128,), (192,)]
    assert kept("position_embedding") == [(128,), (160,)]
    assert kept("stack_0/attention/kernel") == [(2, 128), (2, 160)]
    assert kept("stack_1/kernel") == [(150, 3, 128), (150, 3, 160)]
    assert kept("stack_1/experts/kernel") == [(2, 500, 128), (2, 500, 160)]
    assert kept("stack_0/norm/scale") == [(200, 128)]
    assert kept("stack_0/attention/bias") == [(200, 160)]
    assert kept("stack_0/small/kernel") == [(2, 64, 128)]


def test_no_direction_is_larger_than_one_in_the_root_mean_square(updated):
    for path, leaf in trees.leaves_with_paths(updated[0]):
        axes = -1 if path.endswith(("scale", "bias")) else (-2, -1)
        assert (jnp.sqrt(jnp.mean(jnp.square(leaf), axis=axes)) <= 1.0001).all(), path


def test_a_mesh_splits_rows_and_columns_and_gives_what_one_device_gives(gradients, updated):
    rules = [
        (r"(position_)?embedding", P("tensor", "fsdp")),
        (r".*attention/kernel", P(None, "fsdp", "tensor")),
        (r".*experts/kernel", P(None, None, "tensor", "fsdp")),
        (r".*", P()),
    ]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    optimizer = make_optimizer(CONFIG)
    params = jax.tree.map(lambda leaf: leaf[0], gradients)
    shapes = state_shapes(jax.eval_shape(lambda: params), optimizer, rules, mesh)
    layout = jax.tree.map(lambda shape: shape.sharding, shapes)
    with jax.set_mesh(mesh):
        # By way of the host: `init_state` donates what it is given.
        placed = jax.device_put(jax.device_get(params), layout.params)
        state = init_state(jax.tree.map(jnp.copy, placed), optimizer, shapes).opt_state
        update = jax.jit(optimizer.update, out_shardings=(layout.params, layout.opt_state))
        for step in range(2):
            now = jax.tree.map(lambda leaf, step=step: np.asarray(leaf[step]), gradients)
            directions, state = update(jax.device_put(now, layout.params), state, placed)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6),
        jax.device_get((directions, state)),
        jax.device_get(updated),
    )
    factored = state[1]["stack_0"]["attention"]["kernel"][0]
    shares = {leaf.sharding.spec: leaf.shape for leaf in (factored.v_row, factored.v_col)}
    assert shares == {P(None, "fsdp"): (2, 128), P(None, "tensor"): (2, 160)}
    experts = state[1]["stack_0"]["experts"]["kernel"][0]
    sizes = [m.addressable_shards[0].data.shape for m in (experts.v_row, experts.v_col)]
    assert sizes == [(2, 2, 128 // 4), (2, 2, 144 // 2)]
