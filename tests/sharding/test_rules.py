"""Sharding rules: every parameter has one, and what cannot be split is said."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import FAMILIES, architecture
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings, with_shardings


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_of_a_model_of_8b_is_split_over_fsdp_and_tensor(family, tied, mesh):
    model = architecture(
        ModelConfig(
            family=family, layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336, tied=tied
        ),
        128_256,
    )
    shapes = param_shapes(model)
    layout = dict(trees.leaves_with_paths(shardings(shapes, SHARDING_RULES, mesh)))
    for path, leaf in trees.leaves_with_paths(shapes):
        if "router" in path or path == "position_embedding":
            share = 2
        elif path.endswith(("scale", "bias")):
            share = 2 if path.endswith(("query/bias", "key/bias", "value/bias", "up/bias")) else 1
        else:
            share = 4
        shard = jax.ShapeDtypeStruct(layout[path].shard_shape(leaf.shape), leaf.dtype)
        assert trees.size(shard) * share == trees.size(leaf), path


def test_experts_lie_over_their_own_axis(tiny_model):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    model = tiny_model(family="mixtral", width=32, mlp_width=64, vocab_size=48)
    shapes = with_shardings(param_shapes(model), SHARDING_RULES, mesh)
    mlp = shapes["stack_0"]["layer_0"]["mlp"]
    shard = {
        name: leaf["kernel"].sharding.shard_shape(leaf["kernel"].shape)
        for name, leaf in mlp["experts"].items()
    }
    assert shard == {"gate": (3, 2, 16, 32), "up": (3, 2, 16, 32), "down": (3, 2, 32, 16)}


def test_products_into_a_layer_split_their_outputs_and_back_their_inputs(tiny_model):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    model = tiny_model(width=32, heads=4, kv_heads=4, mlp_width=64, vocab_size=48, tied=False)
    shapes = with_shardings(param_shapes(model), SHARDING_RULES, mesh)
    shards = {
        path.removeprefix("stack_0/layer_0/"): leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in trees.leaves_with_paths(shapes)
        if not path.endswith("scale")
    }
    assert shards == {
        "embedding": (12, 32),
        "output": (32, 12),
        "attention/query/kernel": (3, 32, 8),
        "attention/key/kernel": (3, 32, 8),
        "attention/value/kernel": (3, 32, 8),
        "attention/output/kernel": (3, 8, 32),
        "mlp/gate/kernel": (3, 32, 16),
        "mlp/up/kernel": (3, 32, 16),
        "mlp/down/kernel": (3, 16, 32),
    }


def test_a_parameter_without_a_rule_is_an_error(mesh):
    tree = {"stack_0": {"router": {"bias": jax.ShapeDtypeStruct((4,), "float32")}}}
    with pytest.raises(LookupError, match="stack_0/router/bias"):
        shardings(tree, SHARDING_RULES, mesh)


def test_a_dimension_that_the_axis_does_not_divide_is_named(mesh):
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((6, 5), "float32")}}
    with pytest.raises(UserError, match=r"tensor = 2 does not divide .* 5 .* a/kernel"):
        shardings(tree, [(".*", PartitionSpec("fsdp", "tensor"))], mesh)
    with pytest.raises(UserError, match=r"data x fsdp = 4 does not divide .* 6 .* a/kernel"):
        shardings(tree, [(".*", PartitionSpec(("data", "fsdp")))], mesh)
    with pytest.raises(ValueError, match="more dimensions"):
        shardings(tree, [(".*", PartitionSpec(None, None, "fsdp"))], mesh)


def test_the_first_rule_that_matches_counts(mesh):
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}}
    rules = [("a/.*", PartitionSpec("fsdp")), (".*/kernel", PartitionSpec("tensor"))]
    assert shardings(tree, rules, mesh)["a"]["kernel"].spec == PartitionSpec("fsdp")
