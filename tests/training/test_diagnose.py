"""The first tensor that is not finite is named, wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm import trees
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.objective import Objective
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.training.diagnose import first_non_finite
from jaxllm.training.step import row_keys


@pytest.fixture(scope="module")
def batch(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[5, 3], [8]] * 4, 8))


@pytest.fixture
def diagnose(tiny_model, batch):
    def run(params, batch=batch, frozen=None, **options):
        objective = next_token(tiny_model(**options), CrossEntropyConfig(z_loss=0.01))
        return first_non_finite(objective, params, frozen or {}, batch, None)

    return run


@pytest.fixture
def params(tiny_model, tiny_params):
    return tiny_params(tiny_model())


def planted(params, path, index, value):
    """The parameters with `value` added to one entry of one of them."""
    return trees.map_with_paths(
        lambda name, leaf: leaf.at[index].set(value) if name == path else leaf, params
    )


def test_all_finite(diagnose, params):
    assert diagnose(params) == "everything was finite when the step was run again"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_parameter_is_named_with_its_layer(diagnose, params, value):
    path = "stack_0/layer_0/attention/key/kernel"
    found = diagnose(planted(params, path, (1, 3, 2), value))
    assert found == f"the parameter {path}[1] is not finite"


def test_a_frozen_parameter_is_named_too(diagnose, params):
    frozen = {"final_norm": {"scale": jnp.ones(16).at[5].set(jnp.nan)}}
    trained = {name: leaf for name, leaf in params.items() if name != "final_norm"}
    found = diagnose(trained, frozen=frozen)
    assert found == "the parameter final_norm/scale[5] is not finite"


@pytest.mark.parametrize(
    ("module", "repeat", "remat", "mesh"),
    [
        ("mlp/down", 2, "none", MeshConfig(data=4, tensor=2)),
        ("attention/value", 1, "full", MeshConfig(data=1)),
    ],
)
def test_an_overflow_inside_a_layer_is_named_with_its_repeat(
    diagnose, params, batch, module, repeat, remat, mesh
):
    path = f"stack_0/layer_0/{module}"
    mesh = make_mesh(mesh, jax.devices()[: mesh.data * mesh.tensor])
    # Sums of activations times nearly the largest float are beyond float32.
    params = planted(params, f"{path}/kernel", repeat, 3e38)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh))
        found = diagnose(jax.device_put(params, jax.NamedSharding(mesh, P())), batch, remat=remat)
    assert found == f"the output of {path} (repeat {repeat} of its stack) is not finite"


def test_the_final_norm_is_named_without_a_repeat(diagnose, params):
    found = diagnose(planted(params, "final_norm/scale", slice(None), 3e38))
    assert found == "the output of final_norm is not finite"


def test_a_loss_beyond_finite_states_is_told(diagnose, params, batch):
    found = diagnose(params, batch | {"loss_weights": batch["loss_weights"] * jnp.nan})
    assert found == "the hidden states are finite, but the loss is not"


def test_rows_draw_again_what_they_drew():
    def sums(params, batch, frozen, row_keys):
        drawn = jax.vmap(jax.random.uniform)(row_keys)
        loss = jnp.sum(jnp.where(drawn > 0.9, jnp.inf, params["w"] * drawn))
        return {"drawn": loss}, {}

    objective = Objective({"drawn": 1.0}, lambda batch: {"drawn": jnp.float32(4)}, sums)
    batch = {"tokens": jnp.zeros((4, 2))}
    found = set()
    for step in range(10):
        keys = row_keys(0, step, 4)
        faulty = (jax.vmap(jax.random.uniform)(keys) > 0.9).any()
        told = first_non_finite(objective, {"w": jnp.ones(())}, {}, batch, keys)
        assert ("the loss is not" in told) == faulty
        found.add(bool(faulty))
    assert found == {True, False}
