"""The same three steps on one device and over every kind of mesh."""

import jax
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.models.transformer import SHARDING_RULES, init_params, param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.step import init_state, jit_step, make_train_step, state_shapes

# With a smaller eps, Adam makes a whole step of the rounding of a gradient near zero.
OPTIMIZER = OptimizerConfig(learning_rate=0.01, eps=1e-6)
MESHES = {
    "data": MeshConfig(data=8),
    "all axes": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=4),
}
STEPS = 3


@pytest.fixture(scope="module")
def train(tiny_model, tiny_params, packed_rows):
    """Trains over a mesh; returns the state before, the state after, the metrics."""
    batch = packed_rows([[8], [3, 5], [6], [4, 2], [7], [2, 2, 4], [8], [5]] * 2, 8, 48)

    def run(config, options=OPTIMIZER, family="llama"):
        model = tiny_model(vocab_size=48, layers=2, width=32, family=family)
        sizes = (config.data, config.fsdp, config.expert, config.tensor)
        mesh = make_mesh(config, jax.devices()[: int(np.prod(sizes))])
        optimizer = make_optimizer(options)
        shapes = state_shapes(param_shapes(model), optimizer, SHARDING_RULES, mesh)
        step = make_train_step(
            next_token(model, CrossEntropyConfig(z_loss=1e-3)),
            optimizer,
            learning_rate_schedule(options, STEPS),
            micro_batches=2,
            seed=0,
        )
        with jax.set_mesh(mesh):
            layout = shardings(shapes.params, SHARDING_RULES, mesh)
            # By way of the host: `init_state` donates what it is given.
            params = jax.device_put(jax.device_get(tiny_params(model, scale=1.0)), layout)
            begin = state = init_state(params, optimizer, shapes)
            rows = jax.device_put(batch, batch_sharding(mesh))
            compiled, metrics = jit_step(step, shapes, mesh), []
            for _ in range(STEPS):
                state, measured = compiled(state, {}, rows)
                metrics.append(jax.device_get(measured))
        return begin, state, metrics

    return run


@pytest.fixture(scope="module")
def one_device(train):
    _, state, metrics = train(MeshConfig(data=1))
    return jax.device_get(state.params), metrics


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_what_one_device_gives(train, one_device, mesh):
    config = MESHES[mesh]
    begin, state, metrics = train(config)
    params, expected = one_device
    for found, wanted in zip(metrics, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, err_msg=name)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=2e-5),
        jax.device_get(state.params),
        params,
    )
    assert metrics[-1]["loss"] < metrics[0]["loss"]

    # Parameters and both moments are split over fsdp and tensor, and only there.
    adam = state.opt_state[1]
    for tree in (state.params, adam.mu, adam.nu):
        for path, leaf in trees.leaves_with_paths(tree):
            share = 1 if path.endswith("scale") else config.fsdp * config.tensor
            assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // share}, path
    # The state is donated: its memory is used again.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((begin.params, begin.opt_state)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("gpt2", MESHES["all axes"]),  # a table of positions, biases, layer norms
        ("gemma2", MESHES["all axes"]),  # a unit of two layers, norms after branches
        ("mixtral", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ],
)
def test_other_families_train_on_a_mesh_as_on_one_device(train, family, mesh):
    _, alone, expected = train(MeshConfig(data=1), family=family)
    _, state, metrics = train(mesh, family=family)
    for found, wanted in zip(metrics, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=5e-5, err_msg=name)
    for (path, found), wanted in zip(
        trees.leaves_with_paths(jax.device_get(state.params)),
        jax.tree.leaves(jax.device_get(alone.params)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=5e-5, err_msg=path)


def test_muon_on_a_mesh_gives_what_it_gives_on_one_device(train):
    muon = OptimizerConfig(name="muon", learning_rate=0.01)
    _, _, expected = train(MeshConfig(data=1), muon)
    _, state, found = train(MESHES["all axes"], muon)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    momentum = state.opt_state[1][0].inner_state[0].mu["stack_0"]["layer_0"]["mlp"]["up"]["kernel"]
    assert {s.data.size for s in momentum.addressable_shards} == {momentum.size // 4}


def test_parameters_created_in_place_are_those_of_one_device(tiny_model):
    model = tiny_model(vocab_size=48, layers=2, width=32)
    mesh = make_mesh(MESHES["all axes"])
    layout = shardings(param_shapes(model), SHARDING_RULES, mesh)
    key = jax.random.key(0)
    expected = jax.jit(init_params, static_argnums=0)(model, key)
    found = jax.jit(init_params, static_argnums=0, out_shardings=layout)(model, key)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
