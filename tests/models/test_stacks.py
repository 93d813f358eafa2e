"""Layers cut into other stacks are the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.stacks import cut, last_stacks, restacked, unrolled
from jaxllm.models.transformer import Transformer, param_shapes

MODELS = {
    "one stack": {"layers": 4},
    "a unit of several, and a remainder": {
        "layers": 5,
        "family": "gemma3",
        "pattern": "local,global",
    },
}


@pytest.fixture(params=MODELS)
def model(request, tiny_model):
    return tiny_model(**MODELS[request.param])


@pytest.fixture
def tokens(packed_rows):
    batch = packed_rows([[7, 5], [9]], 12)
    return tuple(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))


def hidden(model, params, tokens):
    return Transformer(model).apply({"params": params}, *tokens).hidden


@pytest.mark.parametrize("layers", range(6))
def test_a_cut_keeps_the_layers_and_their_order(layers, model):
    stacks = cut(model.stacks, layers)
    whole = dataclasses.replace(model, stacks=stacks)
    assert whole.unrolled == model.unrolled
    counts = np.cumsum([stack.repeats * len(stack.unit) for stack in stacks])
    assert min(layers, model.layers) in [0, *counts]
    assert all(stack.repeats for stack in stacks)


def test_cut_models_compute_the_same(model, tiny_params, tokens):
    params = tiny_params(model)
    expected = hidden(model, params, tokens)
    for layers in (1, 3):
        other = dataclasses.replace(model, stacks=cut(model.stacks, layers))
        moved = restacked(params, model.stacks, other.stacks)
        shapes = {path: leaf.shape for path, leaf in trees.leaves_with_paths(moved)}
        wanted = trees.leaves_with_paths(param_shapes(other))
        assert shapes == {path: leaf.shape for path, leaf in wanted}
        np.testing.assert_allclose(hidden(other, moved, tokens), expected, rtol=1e-5, atol=1e-5)
        back = restacked(moved, other.stacks, model.stacks)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_unrolled_is_one_stack(model, tiny_params, tokens):
    other, params = unrolled(model), tiny_params(model)
    assert [stack.repeats for stack in other.stacks] == [1]
    moved = restacked(params, model.stacks, other.stacks)
    np.testing.assert_allclose(
        hidden(other, moved, tokens), hidden(model, params, tokens), rtol=1e-5, atol=1e-5
    )


def test_the_last_layers_have_stacks_of_their_own(tiny_model):
    model = tiny_model(layers=5, family="gemma3", pattern="local,global", top_layers=2)
    numbers = last_stacks(model.stacks, 2)
    last = [layer for number in numbers for layer in model.stacks[number].unit]
    assert tuple(last) == model.unrolled[-2:]
    assert len(model.unrolled) == 5
    with pytest.raises(UserError, match="has 5 layers, and the last 6"):
        tiny_model(layers=5, top_layers=6)
