"""Tiny models of every family, published by our own exporter."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers

from jaxllm.conversion.writing import write_published
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer

VOCAB = 24
# With an odd number of rows and heads that are not the width over their number.
SIZES = {
    "vocab_size": VOCAB,
    "layers": 3,
    "width": 8,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "mlp_width": 16,
    "max_positions": 32,
    "dtype": "float32",
}
OF_FAMILY = {
    "gpt2": {"kv_heads": 0, "head_dim": 0},
    "mistral": {"window": 3},
    "gemma2": {"window": 3, "attention_scale": 0.5},
    "gemma3": {"window": 3, "attention_scale": 0.5, "pattern": "local,local,global"},
    "mixtral": {"experts": 3},
    "qwen3_moe": {"experts": 3, "experts_per_token": 2},
}


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of as many words as it is asked for."""

    def make(size=VOCAB):
        words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, size))]
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(words[:4])
        return HuggingFaceTokenizer(tokenizer.to_str())

    return make


@pytest.fixture(scope="session")
def config_of():
    """Makes the configuration of a tiny model of a family; options change it."""

    def make(family, **options):
        return ModelConfig(**SIZES | {"family": family} | OF_FAMILY.get(family, {}) | options)

    return make


@pytest.fixture(scope="session")
def publish(word_tokenizer):
    """Publishes random parameters of a configuration in a folder, and gives them."""

    def make(folder, config, **options):
        model = architecture(config, VOCAB)
        draw = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), param_shapes(model)
        )
        told = dataclasses.replace(config, vocab_size=model.vocab_size)
        options = {"dtype": "float32", "max_shard_bytes": 10**9} | options
        write_published(folder, told, model, params, word_tokenizer(), **options)
        return params

    return make
