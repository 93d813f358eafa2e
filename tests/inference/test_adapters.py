"""Several adapters at once: each text is what its adapter would have written alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.inference.adapters import joined, parse_adapters, with_adapters
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Request, Sampling
from jaxllm.models.lora import A, B, LoraConfig, init_pairs, merged
from jaxllm.models.transformer import Transformer
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

CONFIGS = {
    "one": LoraConfig(2),
    "other": LoraConfig(3, alpha=8.0, pattern=".*/mlp/.*/kernel"),
    "third": LoraConfig(1, pattern=".*/attention/query/kernel", dropout=0.5),
}


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(ByteTokenizer().vocab_size, layers=3, top_layers=1)


@pytest.fixture(scope="module")
def params(model, tiny_params):
    return tiny_params(model)


@pytest.fixture(scope="module")
def adapters(params):
    """Pairs that change what is written."""

    def drawn(path, leaf):
        key = jax.random.key(len(path))
        return 0.5 * jax.random.normal(key, leaf.shape) if path.endswith(B) else leaf

    return {
        name: trees.map_with_paths(drawn, init_pairs(params, config, jax.random.key(number)))
        for number, (name, config) in enumerate(CONFIGS.items())
    }


def test_each_row_has_the_pair_of_its_adapter(model, params, adapters):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 99, (4, 6)))
    positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
    rows = with_adapters(params, joined(list(adapters.values())), jnp.array([0, 2, 1, 3]))
    found = Transformer(model).apply({"params": rows}, tokens, positions, jnp.ones_like(tokens))
    for row, name in enumerate((None, "other", "one", "third")):
        own = merged(trees.merge(params, adapters[name])) if name else params
        alone = Transformer(model).apply(
            {"params": own}, tokens[row : row + 1], positions[:1], jnp.ones_like(tokens[:1])
        )
        np.testing.assert_allclose(found.hidden[row], alone.hidden[0], rtol=1e-4, atol=1e-4)


def test_a_batch_of_several_is_written_as_each_alone(model, params, adapters):
    tokenizer, sampling = ByteTokenizer(), Sampling(12, temperature=0.0)
    engine = Engine(model, params, tokenizer, context=64, slots=4, adapters=adapters)
    prompts = [(tokenizer.bos_id,), (tokenizer.bos_id, 40, 41), (tokenizer.bos_id, 50, 51, 52)]
    names = ["", *adapters]
    requests = [Request(prompt, sampling, adapter=name) for prompt in prompts for name in names]
    found = engine.complete(requests)
    # One prompt gives another text with each.
    assert len({completion.ids for completion in found[4:8]}) > 2
    for number, name in enumerate(names):
        own = merged(trees.merge(params, adapters[name])) if name else params
        alone = Engine(model, own, tokenizer, context=64, slots=4)
        expected = alone.complete([Request(prompt, sampling) for prompt in prompts])
        for one, other in zip(found[number::4], expected, strict=True):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-3)


def test_an_unknown_adapter_is_refused(model, params, adapters):
    engine = Engine(model, params, ByteTokenizer(), context=64, adapters=adapters)
    with pytest.raises(UserError, match="'two' is no adapter; known are one, other, third"):
        engine.complete([Request((1,), adapter="two")])


def test_ranks_are_filled_up_with_zeros(adapters):
    pairs = dict(trees.leaves_with_paths(joined(list(adapters.values()))))
    path = "stack_0/layer_0/mlp/up/kernel"
    assert pairs[path + A].shape == (2, 4, 16, 3)
    assert not pairs[path + A][:, 0].any()
    assert not pairs[path + A][:, 1, :, 2:].any()
    assert not pairs[path + A][:, 3].any()
    assert not any(path.endswith("dropout") for path in pairs)


def test_names_of_adapters():
    assert parse_adapters("a=runs/x, b = y") == {"a": "runs/x", "b": "y"}
    for text in ("a", "=x", "a=", "a=x,a=y"):
        with pytest.raises(ValueError, match="adapters: "):
            parse_adapters(text)
