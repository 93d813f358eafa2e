"""Low-rank pairs: nothing changes at first, merged is unmerged, and the base has no gradient."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models import lora
from jaxllm.models.lora import LoraConfig, init_pairs, merged, pair_shapes
from jaxllm.models.transformer import SHARDING_RULES, Transformer, output_head, param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.training.step import loss_and_gradients, row_keys

SEQ = 12
ALL = ".*"
LATENT = {"latent_width": 8, "query_latent_width": 6, "rope_head_dim": 4, "kv_heads": 0}
MODELS = {
    "llama": {},
    "untied": {"tied": False},
    "gpt2": {"family": "gpt2", "kv_heads": 0},
    "gemma2": {"family": "gemma2"},
    "mixtral": {"family": "mixtral"},
    "latent": LATENT,
}


@pytest.fixture(params=MODELS)
def model(request, tiny_model):
    return tiny_model(layers=2, **MODELS[request.param])


@pytest.fixture
def rows(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[7, 5], [9]], SEQ))


def adapted(params, config, seed=0, b=0.3):
    """The parameters with pairs that change them."""
    pairs = jax.jit(lambda params, key: init_pairs(params, config, key))(
        params, jax.random.key(seed)
    )

    def drawn(path, leaf):
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(path.encode()))
        if path.endswith(lora.B):
            return b * jax.random.normal(key, leaf.shape)
        if path.endswith(lora.MAGNITUDE):
            return leaf * (1 + 0.3 * jax.random.normal(key, leaf.shape))
        return leaf

    return trees.merge(params, trees.map_with_paths(drawn, pairs))


def run(model, params, rows):
    hidden = (
        Transformer(model)
        .apply({"params": params}, rows["tokens"], rows["positions"], rows["segment_ids"])
        .hidden
    )
    return logits(hidden, output_head(model, params))


forward = jax.jit(run, static_argnums=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_new_pairs_change_no_bit(model, tiny_params, rows, rslora):
    params = tiny_params(model)
    config = LoraConfig(rank=3, pattern=ALL, rslora=rslora)
    pairs = init_pairs(params, config, jax.random.key(0))
    new = trees.merge(params, pairs)
    np.testing.assert_array_equal(forward(model, new, rows), forward(model, params, rows))
    jax.tree.map(np.testing.assert_array_equal, merged(new), dict(params))
    scales = [leaf for path, leaf in trees.leaves_with_paths(pairs) if path.endswith(lora.SCALE)]
    assert all((leaf == np.float32(16 / (3**0.5 if rslora else 3))).all() for leaf in scales)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_unmerged(model, tiny_params, rows, dora):
    params = tiny_params(model, scale=1.0)
    pattern = ALL
    if dora and "experts" in str(jax.tree_util.tree_structure(param_shapes(model))):
        pattern = "(?!.*experts).*"
    new = adapted(params, LoraConfig(rank=3, pattern=pattern, dora=dora), b=0.1)
    unmerged, whole = forward(model, new, rows), forward(model, merged(new), rows)
    np.testing.assert_allclose(unmerged, whole, atol=1e-5 * float(jnp.abs(whole).max()))
    assert float(jnp.abs(whole - forward(model, params, rows)).max()) > 0.01
    assert trees.size(merged(new)) == trees.size(params)


def test_a_pair_of_a_matrix_trains_as_many_numbers_as_the_documentation_says():
    shapes = {"kernel": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    pairs = pair_shapes(shapes, LoraConfig(rank=8, pattern=ALL))
    trained, _ = trees.split(pairs, lora.TRAINED)
    assert {path: leaf.shape for path, leaf in trees.leaves_with_paths(trained)} == {
        "kernel_lora_a": (1024, 8),
        "kernel_lora_b": (8, 512),
    }
    assert trees.size(trained) == 12_288
    assert trees.size(shapes) == 524_288


def test_the_default_adapts_attention_and_mlp(tiny_model):
    shapes = param_shapes(tiny_model(family="mixtral", experts=2))
    paths = {path for path, _ in trees.leaves_with_paths(pair_shapes(shapes, LoraConfig(rank=2)))}
    assert {path.split("/")[2] for path in paths} == {"attention"}  # no experts, no router
    shapes = param_shapes(tiny_model())
    paths = {path for path, _ in trees.leaves_with_paths(pair_shapes(shapes, LoraConfig(rank=2)))}
    names = {path.split("/")[-2] for path in paths}
    assert names == {"query", "key", "value", "output", "gate", "up", "down"}


def gradients(model, params, rows, pattern, keys=None):
    trainable, frozen = trees.split(params, pattern)
    objective = next_token(model, CrossEntropyConfig())
    return loss_and_gradients(objective, trainable, frozen, rows, keys, 1)


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_no_gradient_of_the_base_is_computed(name, tiny_model, packed_rows):
    """A step costs 2 forward passes rather than 3, by the operations of its compiled program."""
    model = tiny_model(width=64, mlp_width=256, layers=2, vocab_size=300, **MODELS[name])
    rows = jax.tree.map(jnp.asarray, packed_rows([[32]] * 2, 32))
    params = param_shapes(model)
    pairs = pair_shapes(params, LoraConfig(rank=1, pattern=".*attention/query/kernel"))
    new = trees.merge(params, pairs)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    whole = flops(lambda p: gradients(model, p, rows, ALL), params)
    pairs_alone = flops(lambda p: gradients(model, p, rows, lora.TRAINED), new)
    objective = next_token(model, CrossEntropyConfig())
    once = flops(lambda p: objective.sums(p, rows, {}, None)[0], params)
    # What the backward pass computes again (`remat`) and the attention's part are in neither.
    assert whole > 2.6 * once
    assert pairs_alone < 2.3 * once


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_mesh_changes_no_number(family, tiny_model, tiny_params, packed_rows):
    config = LoraConfig(rank=3, pattern=ALL)
    rows = jax.tree.map(jnp.asarray, packed_rows([[7, 5], [9], [12], [3, 3]] * 2, SEQ, 48))
    model = tiny_model(48, layers=2, family=family)
    params = adapted(tiny_params(model, scale=1.0), config, b=0.1)
    step = jax.jit(gradients, static_argnums=(0, 3))
    expected = step(model, params, rows, lora.TRAINED)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shardings(params, SHARDING_RULES, mesh))
        found = step(model, laid, rows, lora.TRAINED)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_dropout_is_of_the_pair_and_of_training_alone(tiny_model, tiny_params, rows):
    model = tiny_model(layers=2)
    params = tiny_params(model, scale=1.0)
    plain, dropping = (adapted(params, LoraConfig(rank=3, dropout=rate)) for rate in (0.0, 0.5))
    np.testing.assert_array_equal(forward(model, plain, rows), forward(model, dropping, rows))
    keys = row_keys(0, 0, len(rows["tokens"]))
    step = jax.jit(gradients, static_argnums=(0, 3))
    losses = [float(step(model, p, rows, lora.TRAINED, keys)[0]) for p in (plain, dropping)]
    assert abs(losses[0] - losses[1]) > 1e-4
    untouched = trees.merge(
        params, init_pairs(params, LoraConfig(rank=3, dropout=0.5), jax.random.key(0))
    )
    base = float(step(model, plain | {}, rows, lora.TRAINED)[0])
    assert base == pytest.approx(losses[0], abs=1e-6)
    with_keys = float(step(model, untouched, rows, lora.TRAINED, keys)[0])
    without = float(step(model, untouched, rows, lora.TRAINED)[0])
    assert with_keys == without  # B is zero: what goes in does not matter


def test_dora_leaves_directions_to_the_pair_and_lengths_to_the_magnitude(tiny_model, tiny_params):
    model = tiny_model(layers=1)
    params = tiny_params(model)
    new = adapted(params, LoraConfig(rank=2, dora=True))
    leaves = dict(trees.leaves_with_paths(new))
    for path, kernel in trees.leaves_with_paths(merged(new)):
        if path + lora.MAGNITUDE in leaves:
            lengths = np.linalg.norm(kernel, axis=-2)
            np.testing.assert_allclose(lengths, leaves[path + lora.MAGNITUDE], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": ".*/querry/kernel"},
            "querry/kernel' matches no matrix.* there are [^ ]*query/kernel",
        ),
        ({"pattern": ".*mlp/up/bias"}, r"there are stack_0/layer_0/mlp/up/kernel, "),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        pair_shapes(param_shapes(tiny_model()), LoraConfig(rank=2, **options))


def test_scale_and_dropout_are_trained_by_no_pattern(tiny_model):
    config = LoraConfig(rank=2, dropout=0.1)
    shapes = param_shapes(tiny_model())
    shapes = trees.merge(shapes, pair_shapes(shapes, config))
    for asked in (".*", "lora", ".*attention.*", ".*norm.*|.*_lora_.*"):
        trained, _ = trees.split(shapes, lora.trained_pattern(asked, config))
        paths = [path for path, _ in trees.leaves_with_paths(trained)]
        assert not any(path.endswith((lora.SCALE, lora.DROPOUT)) for path in paths)
        assert any(path.endswith(lora.A) for path in paths)
    assert lora.trained_pattern(".*", LoraConfig()) == ".*"


def test_dora_of_experts_is_refused(tiny_model):
    shapes = param_shapes(tiny_model(family="mixtral"))
    with pytest.raises(UserError, match=r"config\.lora\.dora: .*experts"):
        pair_shapes(shapes, LoraConfig(rank=2, pattern=ALL, dora=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank: must not be negative"),
        ({"alpha": 0.0}, "alpha: must be positive"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\)"),
        ({"pattern": "("}, "pattern: is no regular expression"),
    ],
)
def test_the_configuration_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)
