"""A model of prefix LM sees its prompt both ways; one that sees all both ways does not write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.inference.generate import Sampling, generate, generate_text
from jaxllm.models.transformer import Transformer, output_head
from jaxllm.ops.vocabulary import logits
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

EOS = 49
NEW = 4


def test_greedy_text_is_the_likeliest_of_full_passes_with_the_prompt_as_prefix(
    tiny_model, tiny_params
):
    model = tiny_model(layers=2)
    params = tiny_params(model)
    lengths = np.array([5, 2], np.int32)
    prompts = np.random.default_rng(1).integers(0, EOS, (2, 8)).astype(np.int32)

    def written(prompt_is_prefix):
        return generate(
            params,
            jnp.asarray(prompts),
            jnp.asarray(lengths),
            jax.random.split(jax.random.key(0), 2),
            jnp.float32(0.0),
            model=model,
            max_new_tokens=NEW,
            prompt_is_prefix=prompt_is_prefix,
            eos_id=EOS,
        )

    @jax.jit
    def likeliest(tokens, prefix):
        positions = jnp.arange(tokens.shape[1])[None]
        prefix = jnp.broadcast_to(prefix, tokens.shape)
        output = Transformer(model).apply(
            {"params": params}, tokens, positions, jnp.ones_like(tokens), prefix=prefix
        )
        return jnp.argmax(logits(output.hidden, output_head(model, params)), axis=-1)

    found = np.asarray(written(True))
    for row, length in enumerate(lengths):
        text = np.full((1, 12), 7, np.int32)
        text[0, :length] = prompts[row, :length]
        text[0, length : length + NEW] = found[row]
        expected = np.asarray(likeliest(jnp.asarray(text), length))[0, length - 1 :][:NEW]
        ended = np.flatnonzero(expected == EOS)
        until = ended[0] + 1 if len(ended) else NEW
        np.testing.assert_array_equal(found[row, :until], expected[:until])
    assert (found != np.asarray(written(False))).any()


def test_a_model_that_sees_both_ways_is_refused(tiny_model, tiny_params):
    model = tiny_model(vocab_size=273, causal=False)
    with pytest.raises(UserError, match=r"config\.model\.causal=False.* cannot continue a text"):
        generate_text(model, {}, ByteTokenizer(), ["a"], Sampling())
