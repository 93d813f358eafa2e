"""A base in fewer bits: what it loses, and that pairs beside it are trained as beside any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.models.lora import LoraConfig, init_pairs, trained_pattern
from jaxllm.models.quantised import SCALE, held, rounded
from jaxllm.models.transformer import SHARDING_RULES, Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.training.step import loss_and_gradients

BITS = {"int8": jnp.int8, "nf4": jnp.uint4}
MODELS = {
    "llama": {},
    "gpt2": {"family": "gpt2", "kv_heads": 0},
    "latent": {"latent_width": 8, "query_latent_width": 6, "rope_head_dim": 4, "kv_heads": 0},
}


@pytest.fixture(params=MODELS)
def model(request, tiny_model):
    return tiny_model(layers=2, **MODELS[request.param])


@pytest.fixture
def rows(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[7, 5], [9]], 12))


def hidden(model, params, rows):
    names = ("tokens", "positions", "segment_ids")
    return Transformer(model).apply({"params": params}, *(rows[n] for n in names)).hidden


@pytest.mark.parametrize(("how", "most"), [("int8", 0.01), ("nf4", 0.12), ("bfloat16", 0.003)])
def test_matrices_lose_little(how, most):
    kernel = (
        jax.random.normal(jax.random.key(0), (2, 128, 48)) * jnp.array([0.01, 9])[:, None, None]
    )
    params = {"stack_0": {"layer_0": {"attention": {"query": {"kernel": kernel}}}}}
    found = rounded(params, how)["stack_0"]["layer_0"]["attention"]["query"]["kernel"]
    for one, other in zip(found, kernel, strict=True):
        assert jnp.sqrt(jnp.mean((one - other) ** 2)) < most * jnp.sqrt(jnp.mean(other**2))
    assert not np.array_equal(found, kernel)


@pytest.mark.parametrize("how", BITS)
def test_attention_and_mlp_are_codes_and_scales_and_the_rest_is_as_it_was(how, model, tiny_params):
    params = tiny_params(model)
    found = dict(trees.leaves_with_paths(held(params, how)))
    for path, leaf in trees.leaves_with_paths(params):
        if path.endswith("kernel"):
            assert found[path].dtype == BITS[how]
            assert found[path].shape == leaf.shape
            blocks = leaf.shape[-2] // np.gcd(leaf.shape[-2], 64)
            assert found[path + SCALE].shape == (*leaf.shape[:-2], blocks, leaf.shape[-1])
        else:
            np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("how", ["bfloat16", *BITS])
def test_a_held_base_computes_what_the_rounded_one_does(how, model, tiny_params, rows):
    params = tiny_params(model)
    found = hidden(model, held(params, how), rows)
    expected = hidden(model, rounded(params, how), rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, hidden(model, params, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", BITS)
def test_pairs_have_the_gradient_that_they_have_beside_the_rounded_base(
    how, model, tiny_params, rows
):
    params = tiny_params(model)
    config = LoraConfig(2, base=how)
    pairs = init_pairs(params, config, jax.random.key(0))
    objective = next_token(model, CrossEntropyConfig())
    results = []
    for base in (held(params, how), rounded(params, how)):
        trained, frozen = trees.split(trees.merge(base, pairs), trained_pattern(".*", config))
        results.append(loss_and_gradients(objective, trained, frozen, rows, None, 1)[:2])
    assert set(dict(trees.leaves_with_paths(results[0][1]))) <= set(
        dict(trees.leaves_with_paths(pairs))
    )
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_codes_and_scales_lie_on_a_mesh(tiny_model, tiny_params):
    model = tiny_model(layers=2)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    layout = shardings(held(tiny_params(model), "nf4"), SHARDING_RULES, mesh)
    paths = dict(trees.leaves_with_paths(layout))
    scale = paths["stack_0/layer_0/mlp/up/kernel" + SCALE]
    assert scale.spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_a_base_is_held_in_a_known_way_and_only_beside_pairs():
    with pytest.raises(ValueError, match="base: must be one of bfloat16, int8, nf4"):
        LoraConfig(2, base="int3")
    with pytest.raises(ValueError, match="base: is for low-rank pairs"):
        LoraConfig(base="int8")
