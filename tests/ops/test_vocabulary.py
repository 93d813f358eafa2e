"""Chunked log-probabilities equal the plain ones, and never hold all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.vocabulary import OutputHead, TokenLogProbs, chunk_length, logits, token_log_probs
from jaxllm.sharding.mesh import MeshConfig, make_mesh

BATCH, SEQ, WIDTH, VOCAB = 2, 10, 8, 60


def plain(hidden, head, labels, chunk=None):
    scores = hidden @ head.matrix
    if head.soft_cap:
        scores = head.soft_cap * jnp.tanh(scores / head.soft_cap)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    return TokenLogProbs(
        log_prob=jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0],
        log_sum_exp=jnp.log(jnp.sum(jnp.exp(scores), axis=-1)),
        entropy=-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1),
        mean_log_prob=jnp.mean(log_probs, axis=-1),
    )


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (BATCH, SEQ, WIDTH))
    matrix = jax.random.normal(keys[1], (WIDTH, VOCAB))
    return hidden, matrix, jax.random.randint(keys[2], (BATCH, SEQ), 0, VOCAB)


def weighted(function, hidden, head, labels, chunk):
    """All four results, and a scalar of them in which every position has its own weight."""
    results = function(hidden, head, labels, chunk)
    weights = jax.random.normal(jax.random.key(9), (len(results), BATCH, SEQ))
    return jnp.sum(jnp.stack(results) * weights), results


def gradients(function, inputs, chunk, soft_cap=0.0):
    hidden, matrix, labels = inputs
    run = jax.grad(
        lambda h, m: weighted(function, h, OutputHead(m, soft_cap), labels, chunk),
        argnums=(0, 1),
        has_aux=True,
    )
    return jax.jit(run)(hidden, matrix)


@pytest.fixture(scope="module", params=[0.0, 2.0], ids=["uncapped", "soft cap"])
def expected(request, inputs):
    return request.param, gradients(plain, inputs, 0, request.param)


@pytest.mark.parametrize("chunk", [1, 3, 7, SEQ, 0])
def test_any_chunk_gives_the_plain_values_and_gradients(inputs, expected, chunk):
    soft_cap, plain_ones = expected
    for found, wanted in zip(
        jax.tree.leaves(gradients(token_log_probs, inputs, chunk, soft_cap)),
        jax.tree.leaves(plain_ones),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 3, SEQ])
def test_only_what_is_needed_is_computed(inputs, chunk):
    hidden, matrix, labels = inputs
    counts = np.arange(BATCH) % 4  # of some rows nothing
    rng = np.random.default_rng(5)
    needed = jnp.asarray([rng.permutation(np.arange(SEQ) < count) for count in counts])

    def total(hidden, matrix, needed, counted):
        scores = token_log_probs(hidden, OutputHead(matrix), labels, chunk, needed)
        return jnp.sum(jnp.where(counted, scores.log_prob + 0.3 * scores.entropy, 0.0))

    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    wanted = run(hidden, matrix, None, needed)
    found = run(hidden, matrix, needed, needed)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    if chunk == 1:  # no chunk has more than the needed positions, and what is NaN is not read
        broken = hidden.at[:, -1].set(jnp.nan)
        needed = needed.at[:, -1].set(False)
        by_hidden, by_matrix = run(broken, matrix, needed, needed)[1]
        assert np.isfinite(by_matrix).all()
        assert not np.asarray(by_hidden)[:, -1].any()


def test_the_gradient_of_a_narrow_matrix_is_summed_over_the_chunks_in_float32():
    # 1024 chunks that each add 2^-1 · 2^-6: in bfloat16 their sum would stop growing at 2.
    matrix = jnp.zeros((1, 2), jnp.bfloat16)
    hidden, labels = jnp.full((1, 1024, 1), 2**-6, jnp.bfloat16), jnp.zeros((1, 1024), int)

    def total(matrix):
        return jnp.sum(token_log_probs(hidden, OutputHead(matrix), labels, chunk=1).log_prob)

    np.testing.assert_allclose(jax.grad(total)(matrix).astype(jnp.float32), [[8.0, -8.0]])


def test_no_array_of_all_logits_exists_forward_or_backward(inputs, all_equations):
    hidden, matrix, labels = inputs

    def size(chunk):
        def total(hidden, matrix):
            return weighted(token_log_probs, hidden, OutputHead(matrix), labels, chunk)[0]

        run = jax.grad(total, (0, 1))
        equations = all_equations(jax.make_jaxpr(run)(hidden, matrix).jaxpr)
        return max(result.aval.size for equation in equations for result in equation.outvars)

    assert size(SEQ) >= BATCH * SEQ * VOCAB
    assert size(2) <= max(BATCH * 2 * VOCAB, WIDTH * VOCAB)


def test_extreme_logits_stay_finite():
    hidden = jnp.full((1, 2, 4), 1e4)
    matrix = jnp.eye(4) * jnp.array([1.0, -1.0, 0.5, 0.0])
    results = token_log_probs(hidden, OutputHead(matrix), jnp.array([[0, 1]]))
    np.testing.assert_allclose(results.log_prob, [[0.0, -2e4]])
    np.testing.assert_allclose(results.entropy, 0.0, atol=1e-3)


def test_logits_of_bfloat16_states_are_float32(inputs):
    hidden, matrix, labels = inputs
    hidden, head = hidden.astype(jnp.bfloat16), OutputHead(matrix)
    assert logits(hidden, head).dtype == jnp.float32
    results = token_log_probs(hidden, head, labels)
    assert {r.dtype for r in results} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        results.log_sum_exp, plain(hidden, head, labels).log_sum_exp, rtol=0.02
    )


def test_a_chunk_has_512_tokens_a_device_or_small_logits():
    assert chunk_length(4, 100, 2**17) == 100
    assert chunk_length(4, 1000, 2**17) == 125  # eight chunks of at most 128
    assert chunk_length(4, 1000, 2**11) == 500  # 2,048 tokens of 2^11 logits are small
    assert chunk_length(2**10, 10, 2**20) == 1
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:2])):
        assert chunk_length(4, 1000, 2**17) == 250
