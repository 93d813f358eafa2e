"""Cross-entropy with its gradient made forward, against the log-probabilities of every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.cross_entropy import cross_entropy_sums
from jaxllm.ops.vocabulary import OutputHead, token_log_probs

BATCH, SEQ, WIDTH, VOCAB = 2, 10, 8, 60


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, SEQ, WIDTH))
    matrix = jax.random.normal(keys[1], (WIDTH, VOCAB))
    labels = jax.random.randint(keys[2], (BATCH, SEQ), 0, VOCAB)
    return hidden, matrix, labels, jax.random.uniform(keys[3], (BATCH, SEQ))


def plain(hidden, head, labels, weights, *, label_smoothing, z_loss, chunk):
    del chunk
    scores = token_log_probs(hidden, head, labels, SEQ)
    loss = -(1 - label_smoothing) * scores.log_prob - label_smoothing * scores.mean_log_prob
    loss += z_loss * scores.log_sum_exp**2
    return jnp.sum(weights * loss), jnp.sum(weights * scores.log_prob)


def loss_and_gradients(function, inputs, soft_cap, **options):
    hidden, matrix, labels, weights = inputs

    def total(hidden, matrix, weights):
        loss, log_prob = function(hidden, OutputHead(matrix, soft_cap), labels, weights, **options)
        return jnp.sin(loss / 30), (loss, log_prob)  # a cotangent that is not 1

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(hidden, matrix, weights)


@pytest.mark.parametrize("chunk", [1, 3, SEQ, 0])
@pytest.mark.parametrize(
    ("soft_cap", "label_smoothing", "z_loss"), [(0.0, 0.0, 0.0), (0.0, 0.2, 0.01), (2.0, 0.1, 0.1)]
)
def test_values_and_gradients_are_the_plain_ones(inputs, chunk, soft_cap, label_smoothing, z_loss):
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "chunk": chunk}
    found = loss_and_gradients(cross_entropy_sums, inputs, soft_cap, **options)
    expected = loss_and_gradients(plain, inputs, soft_cap, **options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_metric_has_no_gradient(inputs):
    hidden, matrix, labels, weights = inputs
    gradient = jax.grad(
        lambda h: cross_entropy_sums(h, OutputHead(matrix), labels, weights).log_prob
    )(hidden)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(hidden))


def test_gradients_of_a_narrow_matrix_are_summed_wide(inputs):
    hidden, matrix, labels, weights = inputs
    narrow = matrix.astype(jnp.bfloat16)

    def gradient(matrix):
        def total(matrix):
            head = OutputHead(matrix)
            return cross_entropy_sums(hidden, head, labels, weights, chunk=1).loss

        return jax.grad(total)(matrix)

    found = gradient(narrow)
    assert found.dtype == jnp.bfloat16
    expected = gradient(narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, expected)


def test_no_product_is_computed_a_second_time(inputs, all_equations):
    hidden, matrix, labels, weights = inputs

    def total(hidden, matrix):
        return cross_entropy_sums(hidden, OutputHead(matrix), labels, weights, chunk=2).loss

    def products(function):
        equations = all_equations(jax.make_jaxpr(function)(hidden, matrix).jaxpr)
        return sum(equation.primitive.name == "dot_general" for equation in equations)

    assert products(total) == 1
    assert products(jax.grad(total, (0, 1))) == 3
