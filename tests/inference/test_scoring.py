"""Log-likelihoods of continuations against one full forward pass a pair, and their batching."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.inference.scoring import (
    Pair,
    _score,
    _shape,
    encode_pairs,
    log_likelihoods,
    windows,
)
from jaxllm.models.transformer import Transformer, output_head, param_shapes
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

LIMIT = 48


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def pairs():
    """Pairs of all sizes: of a token each, as long as the limit, and longer than it."""
    draw = random.Random(0)
    sizes = [(1, 1), (1, 5), (7, 2), (12, 12), (40, 9), (44, 5), (30, 30), (1, 100), (60, 3)]
    return [
        Pair(*(tuple(draw.randrange(50) for _ in range(n)) for n in lengths)) for lengths in sizes
    ]


@pytest.fixture(scope="module")
def score(model, tiny_params):
    def scored(pairs, batch_size=4, devices=8, **options):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        options = {"context": LIMIT} | options
        with jax.set_mesh(mesh):
            everywhere = NamedSharding(mesh, PartitionSpec())
            params = jax.device_put(tiny_params(model), everywhere)
            return log_likelihoods(model, params, pairs, batch_size=batch_size, **options)

    return scored


@pytest.fixture(scope="module")
def by_full_pass(model, tiny_params):
    """Log-probabilities of a continuation from the logits of one padded row, and greediness."""

    @jax.jit
    def all_log_probs(tokens, prefix):
        positions = jnp.arange(tokens.shape[1])[None]
        output = Transformer(model).apply(
            {"params": tiny_params(model)}, tokens, positions, jnp.ones_like(tokens), prefix=prefix
        )
        return jax.nn.log_softmax(logits(output.hidden, output_head(model, tiny_params(model))))

    def scored(pair, prefix=0):
        whole = np.zeros((1, 2 * LIMIT), np.int32)
        whole[0, : len(pair.context) + len(pair.continuation)] = pair.context + pair.continuation
        rows = all_log_probs(jnp.asarray(whole), jnp.full(whole.shape, prefix))[0]
        rows = np.asarray(rows)[len(pair.context) - 1 :][: len(pair.continuation)]
        labels = np.array(pair.continuation)
        greedy = bool((rows.argmax(-1) == labels).all())
        return rows[np.arange(len(labels)), labels], greedy

    return scored


def test_scores_are_those_of_a_full_pass(score, pairs, by_full_pass):
    fitting = [pair for pair in pairs if len(pair.context) + len(pair.continuation) <= LIMIT + 1]
    assert len(fitting) == 6
    for pair, found in zip(fitting, score(fitting), strict=True):
        expected, greedy = by_full_pass(pair)
        np.testing.assert_allclose(found.tokens, expected, rtol=1e-4, atol=1e-4)
        assert found.total == pytest.approx(expected.sum(), rel=1e-4)
        assert (found.greedy, found.left_out) == (greedy, 0)


def test_what_the_model_would_write_is_greedy_and_nothing_else_is(score, by_full_pass):
    likeliest = max(range(50), key=lambda token: by_full_pass(Pair((3, 7), (token,)))[0][0])
    found = score([Pair((3, 7), (token,)) for token in range(50)])
    assert [pair.greedy for pair in found] == [token == likeliest for token in range(50)]
    assert sum(np.exp(pair.total) for pair in found) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (3, 1), (16, 8)])
def test_scores_do_not_depend_on_the_batch_the_order_or_the_devices(
    score, pairs, batch_size, devices
):
    expected = score(pairs)
    found = score(pairs[::-1], batch_size, devices)[::-1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.tokens, other.tokens, rtol=1e-4, atol=1e-4)
        assert one[2:] == other[2:]


def test_a_context_that_is_too_long_loses_its_beginning(score, pairs):
    long = pairs[-1]
    found, expected = score([long, Pair(long.context[14:], long.continuation)])
    assert found.tokens == pytest.approx(expected.tokens, rel=1e-4)
    assert (found.left_out, expected.left_out) == (14, 0)  # 60 + 3 - 1 inputs, and room for 48


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 40])
@pytest.mark.parametrize("length", [1, 4, 5, 23])
def test_windows_predict_each_token_once_behind_as_much_as_fits(limit, length):
    whole = tuple(range(100, 100 + length))
    pieces = windows(Pair((1, 2, 3), whole), limit)
    assert sum((piece.continuation for piece in pieces), ()) == whole
    text = (1, 2, 3, *whole)
    for piece in pieces:
        end = text.index(piece.continuation[0])
        assert piece.context == text[:end][-(limit - len(piece.continuation) + 1) :]
        assert len(piece.context) >= 1
        assert len(piece.context) + len(piece.continuation) - 1 <= limit


def test_windows_of_the_documented_example_of_rolling_log_likelihood():
    pieces = windows(Pair((99,), tuple(range(10))), 4)
    assert pieces == [
        Pair((99,), (0, 1, 2, 3)),
        Pair((3,), (4, 5, 6, 7)),
        Pair((5, 6, 7), (8, 9)),
    ]


def test_a_text_longer_than_the_context_is_the_sum_of_its_windows(score, pairs):
    pair = pairs[-2]
    found = score([pair])[0]
    parts = score(windows(pair, LIMIT))
    assert len(found.tokens) == len(pair.continuation)
    assert found.total == pytest.approx(sum(part.total for part in parts), rel=1e-4)
    assert found.left_out == 0


def test_a_prefix_is_seen_both_ways(score, by_full_pass, pairs):
    pair = pairs[3]
    found = score([pair], prompt_is_prefix=True)[0]
    expected, _ = by_full_pass(pair, prefix=len(pair.context))
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-4, atol=1e-4)
    assert found.total != pytest.approx(score([pair])[0].total, rel=1e-3)


def test_few_programs_are_compiled_whatever_the_lengths(score):
    draw = random.Random(1)
    limit = 2048
    sizes = [(draw.randint(1, 3000), draw.randint(1, 300)) for _ in range(2000)]
    shapes = {
        _shape(piece, limit)
        for context, length in sizes
        for piece in windows(Pair((1,) * context, (2,) * length), limit)
    }
    assert len(shapes) <= 7 * 5  # rows of 32 … 2048, continuations of 8, 32, 128, 512, or the row
    before = _score._cache_size()
    score([Pair((1,) * n, (2,)) for n in range(1, 33)], batch_size=8, devices=1)
    assert _score._cache_size() - before <= 1


def test_the_vocabulary_is_never_held_for_all_positions(tiny_model, all_equations):
    model = tiny_model(5000)
    rows, length = 4, 8192

    def scored(params, tokens, contexts):
        return _score(params, tokens, contexts, tokens, model=model, prefix=False)

    shapes = (
        param_shapes(model),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    largest = max(
        variable.aval.size
        for equation in all_equations(jax.make_jaxpr(scored)(*shapes).jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "shape") and variable.aval.shape[-1:] == (model.vocab_size,)
    )
    assert largest <= rows * length * model.vocab_size / 8


def test_an_empty_continuation_is_certain_and_no_pairs_are_no_trouble(score):
    assert score([Pair((1, 2), ())]) == [(0, (), True, 0)]
    assert score([]) == []


def test_a_model_that_gives_no_numbers_is_refused(model, tiny_params):
    mesh = make_mesh(MeshConfig())
    broken = jax.tree.map(lambda array: array * jnp.nan, tiny_params(model))
    broken = jax.device_put(broken, NamedSharding(mesh, PartitionSpec()))
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match="outputs are not finite numbers"),
    ):
        log_likelihoods(model, broken, [Pair((1, 2), (2,))], context=LIMIT, batch_size=4)


def test_a_model_that_sees_both_ways_is_refused(tiny_model, tiny_params):
    model = tiny_model(causal=False)
    with (
        jax.set_mesh(make_mesh(MeshConfig())),
        pytest.raises(UserError, match="gives a text no likelihood"),
    ):
        log_likelihoods(model, tiny_params(model), [Pair((1,), (2,))], context=8)


def test_white_space_between_the_parts_is_predicted():
    tokenizer = ByteTokenizer()
    one, other, empty = encode_pairs(tokenizer, [("ab ", "c"), ("ab", " c"), ("", "ab")])
    assert (
        one
        == other
        == Pair((tokenizer.bos_id, *tokenizer.encode("ab")), tuple(tokenizer.encode(" c")))
    )
    assert empty == Pair((tokenizer.bos_id,), tuple(tokenizer.encode("ab")))


def test_a_token_across_the_border_is_predicted_whole():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=278), ["abcabcabcabc " * 50])
    assert len(tokenizer.encode("abc")) < len(tokenizer.encode("ab") + tokenizer.encode("c"))
    (pair,) = encode_pairs(tokenizer, [("ab", "c")])
    assert [*pair.context[1:], *pair.continuation] == tokenizer.encode("abc")
    assert tokenizer.decode(pair.continuation).endswith("c")
