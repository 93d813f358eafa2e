"""What a forward pass records is what its layers compute, however they lie in stacks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.intermediates import ATTENTION, COLLECTIONS, HIDDEN, of_layer
from jaxllm.models.stacks import restacked, unrolled
from jaxllm.models.transformer import Transformer


@pytest.fixture
def recorded(packed_rows):
    batch = packed_rows([[7, 5], [9]], 12)
    inputs = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]

    def run(model, params):
        apply = functools.partial(Transformer(model).apply, mutable=list(COLLECTIONS))
        return jax.jit(apply)({"params": params}, *inputs)

    return run


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_are_found_in_their_stacks(remat, recorded, tiny_model, tiny_params):
    model = tiny_model(family="gemma3", layers=5, pattern="local,global", remat=remat)
    params, flat = tiny_params(model), unrolled(model)
    output, found = recorded(model, params)
    expected = recorded(flat, restacked(params, model.stacks, flat.stacks))[1]
    for number in range(5):
        for collection in COLLECTIONS:
            ours = of_layer(model, found, collection, number)
            theirs = of_layer(flat, expected, collection, number)
            for name in ("hidden",) if collection == HIDDEN else ("queries", "keys"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    layers = [of_layer(model, found, HIDDEN, number)["hidden"] for number in range(5)]
    assert all(np.abs(one - other).max() > 1e-2 for one, other in itertools.pairwise(layers))
    # Behind the last comes the final norm alone.
    scale = np.asarray(params["final_norm"]["scale"]) + model.norm.offset
    last = np.asarray(layers[-1])
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + model.norm.eps) * scale
    np.testing.assert_allclose(output.hidden, normed, rtol=1e-4, atol=1e-4)


def test_latent_attention_records_whole_heads(recorded, tiny_model, tiny_params):
    model = tiny_model(layers=1, kv_heads=0, latent_width=6, rope_head_dim=2, value_head_dim=5)
    _, found = recorded(model, tiny_params(model))
    heads = of_layer(model, found, ATTENTION, 0)
    config = model.unrolled[0].attention
    for name in ("queries", "keys"):
        assert heads[name].shape[2:] == (config.heads, config.head_dim)
