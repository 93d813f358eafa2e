"""Generation against repeated full forward passes, and its independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.inference.generate import Sampling, fitting, generate, generate_text
from jaxllm.models.transformer import Transformer, output_head
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

PROMPTS = np.array([[7, 3, 9, 4, 1], [5, 8, 0, 0, 0], [6, 6, 2, 0, 0]], np.int32)
LENGTHS = np.array([5, 2, 3], np.int32)
NEW = 6
NO_EOS = -1


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2, tied=False)


@pytest.fixture(scope="module")
def run(model, tiny_params):
    """`(rows, temperature, seed, **options) -> new tokens` for some rows of the prompts."""

    def generated(
        rows=(0, 1, 2), temperature=0.0, seed=0, eos_id=NO_EOS, prompts=PROMPTS, **kwargs
    ):
        rows = np.array(rows)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        return np.asarray(
            generate(
                tiny_params(model),
                jnp.asarray(prompts[rows]),
                jnp.asarray(LENGTHS[rows]),
                keys,
                jnp.float32(temperature),
                model=model,
                max_new_tokens=NEW,
                eos_id=eos_id,
                **kwargs,
            )
        )

    return generated


@pytest.fixture(scope="module")
def greedy(model, tiny_params):
    """The likeliest continuations, from the whole text anew for each token."""
    params = tiny_params(model)
    total = PROMPTS.shape[1] + NEW
    forward = jax.jit(
        lambda tokens: (
            Transformer(model)
            .apply(
                {"params": params},
                tokens,
                jnp.broadcast_to(jnp.arange(total), tokens.shape),
                jnp.ones_like(tokens),
            )
            .hidden
            @ output_head(model, params).matrix
        )
    )
    tokens = np.zeros((len(PROMPTS), total), np.int32)
    tokens[:, : PROMPTS.shape[1]] = PROMPTS
    rows = np.arange(len(PROMPTS))
    for step in range(NEW):
        at = LENGTHS + step
        tokens[rows, at] = np.argmax(forward(tokens)[rows, at - 1], axis=-1)
    return np.stack([tokens[row, n : n + NEW] for row, n in enumerate(LENGTHS)])


def test_greedy_equals_repeated_full_forward_passes(run, greedy):
    assert len(np.unique(greedy)) > 4  # varied enough to tell
    np.testing.assert_array_equal(run(), greedy)


def test_greedy_ignores_the_key_and_what_pads_the_prompt(run, greedy):
    padded = np.where(np.arange(PROMPTS.shape[1]) < LENGTHS[:, None], PROMPTS, 33)
    np.testing.assert_array_equal(run(seed=5, prompts=padded), greedy)


def test_a_row_ends_at_eos_and_is_filled_with_it(run, greedy):
    row, stop = 0, 2
    eos = int(greedy[row, stop])
    found = run(eos_id=eos)
    for line, expected in zip(found, greedy, strict=True):
        ends = np.flatnonzero(expected == eos)
        length = ends[0] if len(ends) else NEW
        np.testing.assert_array_equal(line[:length], expected[:length])
        assert (line[length:] == eos).all()
    assert (found[row, stop:] == eos).all()


def test_a_sampled_row_depends_on_its_own_key_alone(run):
    together = run(temperature=1.0)
    for row in range(3):
        np.testing.assert_array_equal(run(rows=[row], temperature=1.0)[0], together[row])
    np.testing.assert_array_equal(run(temperature=1.0), together)
    assert (run(temperature=1.0, seed=1) != together).any(axis=1).all()


def test_each_new_token_has_a_draw_of_its_own(model, tiny_params):
    """From equal probabilities, the same key at every step would repeat one token."""
    params = tiny_params(model) | {"output": jnp.zeros((model.width, model.vocab_size))}
    found = generate(
        params,
        jnp.asarray(PROMPTS),
        jnp.asarray(LENGTHS),
        jax.random.split(jax.random.key(0), 3),
        jnp.float32(1.0),
        model=model,
        max_new_tokens=NEW,
        eos_id=NO_EOS,
    )
    assert all(len(set(row)) > 2 for row in np.asarray(found).tolist())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_likeliest_alone_is_left_of_top_k_1_or_a_tiny_top_p(run, greedy, options):
    np.testing.assert_array_equal(run(temperature=1.0, **options), greedy)


@pytest.fixture(scope="module")
def texts(tiny_model, tiny_params):
    tokenizer = train_tokenizer(
        TokenizerConfig(vocab_size=300), ["the quick brown fox jumps over the lazy dog"]
    )
    model = tiny_model(vocab_size=tokenizer.vocab_size, layers=2, tied=False)
    run = functools.partial(generate_text, model, tiny_params(model), tokenizer)
    return run, tokenizer


def test_text_is_the_decoded_continuation_of_each_prompt_as_a_documents_beginning(texts):
    run, tokenizer = texts
    model, params, _ = run.args
    prompts = ["the fox", "", "a lazy dog over"]
    sampling = Sampling(max_new_tokens=NEW, temperature=0.0)
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    padded = np.zeros((3, 16), np.int32)
    for row, line in enumerate(ids):
        padded[row, : len(line)] = line
    found = generate(
        params,
        jnp.asarray(padded),
        jnp.asarray([len(line) for line in ids], jnp.int32),
        jax.random.split(jax.random.key(0), 3),
        jnp.float32(0.0),
        model=model,
        max_new_tokens=NEW,
        eos_id=tokenizer.eos_id,
    )
    expected = [tokenizer.decode(line) for line in np.asarray(found).tolist()]
    assert run(prompts, sampling) == expected
    assert len(set(expected)) == 3


def test_a_text_depends_on_seed_and_row_not_on_the_other_prompts(texts):
    run, _ = texts
    sampling = Sampling(max_new_tokens=NEW)
    before = run(["fox", "fox", "the dog"], sampling)
    assert run(["fox", "fox", "the dog"], sampling) == before
    assert before[0] != before[1]  # the same prompt in another row draws anew
    assert run(["fox", "a lazy dog jumps", "quick"], sampling)[0] == before[0]
    assert run(["fox", "fox", "the dog"], sampling, seed=1) != before


def test_text_ends_at_the_end_of_the_document(texts):
    run, tokenizer = texts
    model, params, _ = run.args
    # An output matrix that knows one answer: the end.
    ends = jnp.zeros_like(params["output"]).at[:, tokenizer.eos_id].set(1.0)
    embedding = jnp.ones_like(params["embedding"])
    quiet = jax.tree.map(jnp.zeros_like, params["stack_0"])
    params = params | {"output": ends, "embedding": embedding, "stack_0": quiet}
    assert generate_text(model, params, tokenizer, ["fox"], Sampling(4, 0.0)) == [""]


def test_all_learned_positions_are_written_to_and_no_more(tiny_model, tiny_params):
    model = tiny_model(vocab_size=273, layers=1, positions="learned", max_positions=8)
    params, tokenizer = tiny_params(model), ByteTokenizer()
    # The prompt has its beginning and 2 bytes; the last of the new tokens is never fed.
    fits = fitting(model, tokenizer, "ab", Sampling(max_new_tokens=40))
    assert fits == Sampling(max_new_tokens=6)
    assert fitting(model, tokenizer, "ab", Sampling(max_new_tokens=3)).max_new_tokens == 3
    generate_text(model, params, tokenizer, ["ab"], fits)
    with pytest.raises(UserError, match=r"max_new_tokens: with the prompt, .*: 9 tokens are more"):
        generate_text(model, params, tokenizer, ["ab"], Sampling(max_new_tokens=7))
    assert fitting(model, tokenizer, "1234567", Sampling()).max_new_tokens == 1
    with pytest.raises(UserError, match=r"^config\.prompt: 9 tokens are more than the 8 positions"):
        fitting(model, tokenizer, "12345678", Sampling())


def test_without_a_table_of_positions_nothing_is_shortened(model):
    assert fitting(model, ByteTokenizer(), "ab", Sampling()) == Sampling()
