"""Parts of a model: which weights they keep, and which models have none so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.pruned import part_layers, part_of, pruned
from jaxllm.models.transformer import param_shapes

VOCAB = 50
WHOLE = {"layers": 3, "width": 20, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 40}
PART = {"layers": 3, "width": 12, "heads": 2, "kv_heads": 1, "mlp_width": 24}
LATENT = {"latent_width": 6, "rope_head_dim": 2, "value_head_dim": 10, "kv_heads": 0}
FAMILIES = {
    "llama": ({}, {}),
    "untied": ({"tied": False}, {}),
    "gpt2": ({"family": "gpt2", "kv_heads": 4}, {"kv_heads": 2}),
    "gemma3": ({"family": "gemma3", "pattern": "local,global", "window": 4}, {}),
    "qwen3": ({"family": "qwen3"}, {}),
    "latent": (LATENT, {"kv_heads": 0}),
    "compressed queries": (LATENT | {"query_latent_width": 7}, {"kv_heads": 0}),
    "experts": ({"family": "mixtral", "experts": 3}, {"mlp_width": 0}),
}
# What is kept of each size in the whole, all of it known by how large it is.
CHANNELS = np.asarray([0, 1, 3, 4, 7, 8, 11, 12, 13, 16, 17, 19])
UNITS = np.sort(np.random.default_rng(1).permutation(40)[:24])
KV_HEADS = np.asarray([1])
HEADS = np.asarray([2, 3])


def drawn(config):
    """Parameters of a model, quickly."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(architecture(config, VOCAB))
    return jax.tree.map(lambda leaf: jnp.float32(1.0 + rng.random(leaf.shape)), shapes)


def places(path, ours, theirs, config):
    """Where along an axis of the whole its part stands."""
    if ours == theirs:
        return np.arange(theirs)
    if ours == PART["width"]:
        return CHANNELS
    if ours == PART["mlp_width"]:
        return UNITS
    name = path.split("/")[3]
    grouped = name in ("key", "value") and not config.latent_width and config.kv_heads != 4
    kept, count = (KV_HEADS, 2) if grouped else (HEADS, 4)
    block = theirs // count
    return (kept[:, None] * block + np.arange(block)).reshape(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_model_that_is_a_small_one_and_nothing_else_the_small_one_is_kept(name):
    of_whole, of_part = FAMILIES[name]
    whole = ModelConfig(**WHOLE | of_whole)
    part = part_of(ModelConfig(**PART | of_part), whole)
    small = drawn(part)

    def embedded(path, shape):
        leaf = small
        for key in path.split("/"):
            leaf = leaf[key]
        sizes = zip(leaf.shape, shape.shape, strict=True)
        kept = [places(path, ours, theirs, whole) for ours, theirs in sizes]
        large = np.zeros(shape.shape, np.float32)
        large[np.ix_(*kept)] = leaf
        return large

    models = [architecture(config, VOCAB) for config in (whole, part)]
    large = trees.map_with_paths(embedded, param_shapes(models[0]))
    found = jax.jit(lambda params: pruned(params, *models, range(3)))(large)
    expected = dict(trees.leaves_with_paths(small))
    assert {path for path, _ in trees.leaves_with_paths(found)} == set(expected)
    for path, leaf in trees.leaves_with_paths(found):
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_layers_are_taken_whole_and_laid_out_anew():
    whole = ModelConfig(family="gemma3", pattern="local,global", **WHOLE | {"layers": 5})
    part = part_of(dataclasses.replace(whole, layers=3), whole)
    models = [architecture(config, VOCAB) for config in (whole, part)]
    params = drawn(whole)
    assert part_layers([1, 4, 5], *models, "here") == [0, 3, 4]
    found = pruned(params, *models, [0, 3, 4])
    np.testing.assert_array_equal(found["embedding"], params["embedding"])
    taken = [("stack_0", "layer_0", 0), ("stack_0", "layer_1", 1), ("stack_1", "layer_0", 0)]
    stand = [("stack_0", "layer_0", 0), ("stack_0", "layer_1", 0), ("stack_1", "layer_0", 0)]
    for (a, b, c), (x, y, z) in zip(stand, taken, strict=True):
        for one, other in zip(
            jax.tree.leaves(found[a][b]), jax.tree.leaves(params[x][y]), strict=True
        ):
            np.testing.assert_array_equal(one[c], other[z])


@pytest.mark.parametrize(
    ("family", "layers", "part", "taken"),
    [
        ("llama", 4, 2, [0, 3]),
        ("llama", 4, 3, [0, 1, 3]),
        ("llama", 6, 1, [0]),
        ("gemma2", 4, 2, [0, 3]),
        ("gemma3", 12, 6, [0, 2, 4, 7, 9, 11]),
    ],
)
def test_layers_are_spaced_evenly_and_attend_as_they_did(family, layers, part, taken):
    whole = ModelConfig(**WHOLE | {"family": family, "layers": layers})
    models = [
        architecture(config, VOCAB)
        for config in (whole, part_of(dataclasses.replace(whole, layers=part), whole))
    ]
    assert part_layers([], *models, "here") == taken


def test_layers_that_cannot_be_taken():
    whole = ModelConfig(family="gemma2", window=4, **WHOLE | {"layers": 4})
    part = part_of(dataclasses.replace(whole, layers=2), whole)
    models = [architecture(config, VOCAB) for config in (whole, part)]
    assert part_layers([1, 4], *models, "here") == [0, 3]
    with pytest.raises(UserError, match="here: layer 2 of the whole model attends in another way"):
        part_layers([2, 4], *models, "here")
    with pytest.raises(UserError, match="names 1 layers, and each of the part's 2"):
        part_layers([1], *models, "here")
    for named in ([1, 5], [0, 2], [4, 1], [1, 1]):
        with pytest.raises(UserError, match="counted from 1, rise, and end at 4"):
            part_layers(named, *models, "here")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 24}, "config.model.width: a part has at most the 20 of the whole model, and 24"),
        ({"mlp_width": 64}, "config.model.mlp_width: a part has at most the 40"),
        (WHOLE, "a part is smaller than the whole"),
        ({"heads": 4, "kv_heads": 1}, "4 query heads would share keys and values"),
    ],
)
def test_what_is_no_part(given, message):
    with pytest.raises(UserError, match=message):
        part_of(ModelConfig(**{"head_dim": 8} | PART | given), ModelConfig(**WHOLE))


def test_experts_keep_their_width():
    whole = ModelConfig(family="mixtral", experts=3, **WHOLE)
    assert part_of(ModelConfig(**PART | {"mlp_width": 0}), whole).mlp_width == 40
    with pytest.raises(UserError, match="experts keep their width, 40"):
        part_of(ModelConfig(**PART), whole)


def test_sizes_that_are_not_given_follow_from_the_teacher():
    whole = ModelConfig(**WHOLE)
    part = part_of(ModelConfig(layers=2, width=20, heads=4), whole)
    assert (part.kv_heads, part.mlp_width, part.head_dim) == (2, 40, 8)
    part = part_of(ModelConfig(layers=2, width=10, heads=2), whole)
    assert (part.kv_heads, part.mlp_width, part.head_dim) == (1, 20, 8)


def test_it_is_of_its_own_dtype():
    whole = ModelConfig(**WHOLE)
    part = dataclasses.replace(part_of(ModelConfig(**PART), whole), param_dtype="bfloat16")
    models = [architecture(config, VOCAB) for config in (whole, part)]
    leaves = jax.tree.leaves(pruned(drawn(whole), *models, range(3)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
