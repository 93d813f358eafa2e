"""Inner states of a student beside its teacher's, against plain formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention.visibility import Places, Rule
from jaxllm.ops.matching import Heads, attention_divergence, hidden_error

BATCH, SEQ = 2, 10
RULES = {
    "causal": (Rule(True, 0, 0.0, 0.4, True), Rule(True, 0, 0.0, 0.3, True)),
    "windows and caps": (Rule(True, 3, 2.0, 0.5, True), Rule(True, 4, 1.5, 0.7, True)),
    "both ways": (Rule(False, 0, 0.0, 0.5, True), Rule(False, 0, 0.0, 0.5, True)),
}
SEGMENTS = np.asarray([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3])
POSITIONS = np.asarray([[*range(6), *range(4)], [*range(7), *range(3)]])
PLACES = Places(*map(jnp.asarray, (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)))


@pytest.fixture(scope="module")
def weights():
    weights = np.random.default_rng(3).uniform(0.1, 2, (BATCH, SEQ))
    weights[0, 4:6] = weights[1, 7:] = 0
    return weights


def test_hidden_states_through_a_projection(weights):
    rng = np.random.default_rng(0)
    hidden, target = rng.normal(size=(BATCH, SEQ, 4)), 9 * rng.normal(size=(BATCH, SEQ, 7))
    projection = rng.normal(size=(4, 7))
    target[1, 7:] = np.nan  # of weight 0

    def expected(hidden, projection):
        apart = ((hidden @ projection - target) ** 2).sum(-1) / (target**2).sum(-1)
        return np.where(weights > 0, weights * apart, 0).sum()

    found = jax.value_and_grad(hidden_error, (0, 2))
    value, gradients = found(*map(jnp.float32, (hidden, target, projection, weights)))
    np.testing.assert_allclose(value, expected(hidden, projection), rtol=1e-5)
    check_slopes(expected, (hidden, projection), gradients)


def in_numpy(queries, keys, mix, teacher_queries, teacher_keys, rules, weights):
    """Loops over everything."""
    total = 0.0
    scores = []
    for q, k, rule in zip((queries, teacher_queries), (keys, teacher_keys), rules, strict=True):
        k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
        each = rule.scale * np.einsum("bqhd,bthd->bhqt", q, k)
        scores.append(rule.soft_cap * np.tanh(each / rule.soft_cap) if rule.soft_cap else each)
    mixed = np.einsum("bhqt,hg->bgqt", scores[0], mix)
    for row in range(BATCH):
        for query in range(SEQ):
            if not weights[row, query]:
                continue
            seen = [
                key
                for key in range(SEQ)
                if SEGMENTS[row, key] == SEGMENTS[row, query]
                and all(not r.causal or key <= query for r in rules)
                and all(not r.window or abs(query - key) < r.window for r in rules)
            ]
            for head in range(mix.shape[1]):
                log_p, log_q = (
                    s[seen] - np.log(np.exp(s[seen]).sum())
                    for s in (scores[1][row, head, query], mixed[row, head, query])
                )
                apart = (np.exp(log_p) * (log_p - log_q)).sum()
                total += weights[row, query] * apart / mix.shape[1]
    return total


@pytest.mark.parametrize("name", RULES)
def test_where_heads_look(name, weights):
    rng = np.random.default_rng(1)
    rules = RULES[name]
    queries, keys = rng.normal(size=(BATCH, SEQ, 4, 3)), rng.normal(size=(BATCH, SEQ, 2, 3))
    theirs = [rng.normal(size=(BATCH, SEQ, heads, 5)) for heads in (6, 2)]
    mix = rng.normal(size=(4, 6))

    def ours(queries, keys, mix, chunk):
        student, teacher = (
            Heads(queries, keys, rules[0]),
            Heads(*map(jnp.float32, theirs), rules[1]),
        )
        return attention_divergence(student, teacher, mix, PLACES, jnp.float32(weights), chunk)

    given = tuple(map(jnp.float32, (queries, keys, mix)))
    slopes = jax.jit(jax.value_and_grad(ours, (0, 1, 2)), static_argnums=3)
    value, gradients = slopes(*given, 0)

    def expected(*given):
        return in_numpy(*given, *theirs, rules, weights)

    np.testing.assert_allclose(value, expected(queries, keys, mix), rtol=1e-5)
    check_slopes(expected, (queries, keys, mix), gradients)
    for chunk in (3, 5):
        again, of_chunks = slopes(*given, chunk)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        for one, other in zip(of_chunks, gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_head_that_looks_as_its_teacher_does_loses_nothing(weights):
    rng = np.random.default_rng(2)
    queries, keys = (jnp.float32(rng.normal(size=(BATCH, SEQ, n, 4))) for n in (4, 2))
    heads = Heads(queries, keys, RULES["windows and caps"][0])
    found = attention_divergence(heads, heads, jnp.eye(4), PLACES, jnp.float32(weights))
    assert abs(float(found)) < 1e-5
    of_teacher = jax.grad(
        lambda q: attention_divergence(
            heads, heads._replace(queries=2 * q), jnp.eye(4), PLACES, jnp.float32(weights)
        )
    )(queries)
    np.testing.assert_array_equal(of_teacher, 0)


def check_slopes(function, arguments, gradients, step=1e-6):
    """Gradients against differences, at some entries of each argument."""
    rng = np.random.default_rng(4)
    for number, gradient in enumerate(gradients):
        scale = float(np.abs(gradient).max())
        for _ in range(6):
            place = tuple(rng.integers(size) for size in gradient.shape)
            moved = []
            for sign in (1, -1):
                changed = [np.array(argument) for argument in arguments]
                changed[number][place] += sign * step
                moved.append(function(*changed))
            slope = (moved[0] - moved[1]) / (2 * step)
            np.testing.assert_allclose(gradient[place], slope, rtol=1e-3, atol=1e-4 * scale)
