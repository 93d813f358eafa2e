"""Divergences of a student from its teacher, against plain formulas in float64 NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.divergence import (
    DIVERGENCES,
    DivergenceConfig,
    Live,
    Stored,
    divergence_sums,
    outcomes,
)
from jaxllm.ops.vocabulary import OutputHead, likeliest

BATCH, SEQ, WIDTH, TEACHER_WIDTH, VOCAB = 2, 10, 6, 9, 23
CONFIGS = {
    "forward": DivergenceConfig(),
    "reverse": DivergenceConfig("reverse_kl", temperature=2.0),
    "jsd": DivergenceConfig("jsd", beta=0.3, alpha=0.25),
    "jsd of 0": DivergenceConfig("jsd", beta=0.0, temperature=0.7),
    "jsd of 1": DivergenceConfig("jsd", beta=1.0, alpha=0.5, temperature=1.5),
    "total variation": DivergenceConfig("total_variation", temperature=3.0, alpha=0.1),
    "unscaled": DivergenceConfig(temperature=2.0, scale_by_temperature=False),
    "hard": DivergenceConfig(alpha=1.0),
}


@pytest.fixture(scope="module")
def inputs():
    """Hidden states and matrices of student and teacher, labels, and ragged weights."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 2, (BATCH, SEQ))
    weights[0, 7:] = weights[1, :4] = 0
    hidden, matrix = rng.normal(size=(BATCH, SEQ, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    # The teacher is somewhat like the student, so that their likeliest tokens are often the same.
    more = TEACHER_WIDTH - WIDTH
    return {
        "hidden": hidden,
        "matrix": matrix,
        "teacher": np.concatenate([hidden, rng.normal(size=(BATCH, SEQ, more))], -1),
        "teacher_matrix": np.concatenate([matrix, 0.7 * rng.normal(size=(more, VOCAB))]),
        "labels": rng.integers(0, VOCAB, (BATCH, SEQ)),
        "weights": weights,
    }


def log_softmax(scores):
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def kl(a, b):
    """KL(a ‖ b) of each token."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * (np.log(a) - np.log(b)), 0.0).sum(-1)


def in_numpy(config, p, q):
    """The divergence of each token, from probabilities."""
    beta = config.beta
    if config.divergence == "forward_kl" or (config.divergence == "jsd" and beta == 0):
        return kl(p, q)
    if config.divergence == "reverse_kl" or (config.divergence == "jsd" and beta == 1):
        return kl(q, p)
    if config.divergence == "jsd":
        middle = beta * p + (1 - beta) * q
        return beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    return 0.5 * np.abs(p - q).sum(-1)


def bucketed(probabilities, ids):
    known = np.take_along_axis(probabilities, ids, -1)
    return np.concatenate([known, 1 - known.sum(-1, keepdims=True)], -1)


def expected(config, inputs, hidden, matrix, cap=0.0, ids=None):
    """The sums, by the formulas."""

    def capped(scores):
        return cap * np.tanh(scores / cap) if cap else scores

    temperature = config.temperature
    own = capped(hidden @ matrix)
    other = inputs["teacher"] @ inputs["teacher_matrix"]
    p, q = (np.exp(log_softmax(scores / temperature)) for scores in (other, own))
    same = own.argmax(-1) == other.argmax(-1)
    if ids is not None:
        p, q = bucketed(p, ids), bucketed(q, ids)

    def hard(scores):
        at = np.take_along_axis(log_softmax(scores), inputs["labels"][..., None], -1)
        return -at[..., 0]

    divergence = in_numpy(config, p, q)
    scale = temperature**2 if config.scale_by_temperature else 1
    loss = (1 - config.alpha) * scale * divergence + config.alpha * hard(own)
    teacher = hard(other) if ids is None else np.zeros_like(divergence)
    return [
        (inputs["weights"] * each).sum() for each in (loss, divergence, hard(own), teacher, same)
    ]


def teacher_of(inputs, config, k=0):
    if not k:
        teacher, matrix = (
            jnp.asarray(inputs[x], jnp.float32) for x in ("teacher", "teacher_matrix")
        )
        return Live(teacher, OutputHead(matrix))
    log_p = log_softmax(inputs["teacher"] @ inputs["teacher_matrix"] / config.temperature)
    ids = np.argsort(-log_p, axis=-1)[..., :k]
    log_probs = np.take_along_axis(log_p, ids, -1)
    return Stored(jnp.asarray(ids, jnp.int32), jnp.asarray(log_probs, jnp.float32))


def found(config, inputs, chunk, cap=0.0, k=0):
    """The sums, and the gradients of hidden states and matrix."""
    labels, weights = jnp.asarray(inputs["labels"]), jnp.asarray(inputs["weights"], jnp.float32)
    teacher = teacher_of(inputs, config, k)

    def total(hidden, matrix):
        head = OutputHead(matrix, cap)
        sums = divergence_sums(hidden, head, teacher, labels, weights, config, chunk)
        return 3 * sums.loss + sums.divergence, sums  # a cotangent that is not 1

    arrays = (jnp.asarray(inputs[name], jnp.float32) for name in ("hidden", "matrix"))
    (_, sums), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*arrays)
    return sums, gradients


def check(config, inputs, chunk, cap=0.0, k=0):
    hidden, matrix = inputs["hidden"], inputs["matrix"]
    ids = np.asarray(teacher_of(inputs, config, k).ids) if k else None
    sums, gradients = found(config, inputs, chunk, cap, k)
    np.testing.assert_allclose(
        [float(x) for x in sums], expected(config, inputs, hidden, matrix, cap, ids), rtol=3e-5
    )
    step = 1e-6
    for number, gradient in enumerate(gradients):
        both = [hidden, matrix]
        slopes = np.zeros(both[number].shape)
        for place in itertools.product(*map(range, slopes.shape)):
            moved = []
            for sign in (1, -1):
                changed = both[number].copy()
                changed[place] += sign * step
                arguments = [*both]
                arguments[number] = changed
                moved.append(expected(config, inputs, *arguments, cap, ids)[0])
            slopes[place] = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(gradient, 3 * slopes, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_and_gradients_are_those_of_the_formula(name, inputs):
    check(CONFIGS[name], inputs, chunk=3)


def test_the_share_of_tokens_where_both_say_the_same_is_neither_none_nor_all(inputs):
    """Of these inputs, by which it is tested."""
    share = found(CONFIGS["forward"], inputs, 3)[0].agreement / inputs["weights"].sum()
    assert 0.3 < share < 0.9


@pytest.mark.parametrize("chunk", [1, SEQ, 0])
def test_chunks_change_nothing(chunk, inputs):
    check(CONFIGS["jsd"], inputs, chunk, cap=2.0)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "total variation"])
def test_a_stored_teacher_is_compared_over_its_likeliest_tokens_and_the_rest(name, inputs):
    check(CONFIGS[name], inputs, chunk=4, k=5)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_tokens_stored_are_the_whole_distribution(name, inputs):
    config = CONFIGS[name]
    whole, stored = found(config, inputs, 3), found(config, inputs, 3, k=VOCAB)
    np.testing.assert_allclose(stored[0].loss, whole[0].loss, rtol=1e-4)
    for one, other in zip(stored[1], whole[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_teacher_loses_nothing(divergence, inputs):
    config = DivergenceConfig(divergence)
    same = inputs | {"teacher": inputs["hidden"], "teacher_matrix": inputs["matrix"]}
    sums, gradients = found(config, same, chunk=4)
    assert abs(float(sums.divergence)) < 1e-5
    assert sums.agreement == pytest.approx(inputs["weights"].sum())
    if divergence != "total_variation":  # which has a corner there
        for gradient in gradients:
            np.testing.assert_allclose(gradient, 0, atol=2e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_tokens_that_are_never_said_count_nothing(kind):
    """Masked for both: as if they were not in the vocabulary."""
    rng = np.random.default_rng(3)
    log_p, log_q = (log_softmax(rng.normal(size=(4, 7))) for _ in range(2))
    never = np.full((4, 3), -np.inf)
    few = outcomes(kind, 0.3, jnp.asarray(log_p), jnp.asarray(log_q))
    more = outcomes(
        kind, 0.3, *(jnp.asarray(np.concatenate([x, never], -1)) for x in (log_p, log_q))
    )
    np.testing.assert_allclose(few[0], more[0], rtol=1e-6)
    np.testing.assert_allclose(few[1], more[1][:, :7], rtol=1e-6)
    np.testing.assert_array_equal(more[1][:, 7:], 0)


@pytest.mark.parametrize(
    ("kind", "masked", "is_finite"),
    [
        ("forward_kl", "p", True),
        ("forward_kl", "q", False),
        ("reverse_kl", "p", False),
        ("reverse_kl", "q", True),
        *((kind, one, True) for kind in ("jsd", "total_variation") for one in "pq"),
    ],
)
def test_a_token_that_only_one_of_both_says(kind, masked, is_finite):
    """No NaN: a KL in which it divides is infinite, all else what the formula gives."""
    scores = {"p": np.array([1.0, 0.5, 0.2, 0.1]), "q": np.array([0.3, 0.9, 0.4, 0.6])}
    scores[masked][2] = -np.inf
    log_p, log_q = (log_softmax(scores[name]) for name in "pq")
    value, weighted = outcomes(kind, 0.3, jnp.asarray(log_p), jnp.asarray(log_q))
    config = DivergenceConfig(kind, **({"beta": 0.3} if kind == "jsd" else {}))
    np.testing.assert_allclose(value, in_numpy(config, np.exp(log_p), np.exp(log_q)), rtol=1e-6)
    assert bool(jnp.isfinite(value)) == is_finite
    assert not np.isnan(weighted).any()


@pytest.mark.parametrize("of_p", [-80.0, -88.0, -95.0, -110.0])
@pytest.mark.parametrize("of_q", [-80.0, -88.0, -95.0, -120.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_is_too_unlikely_for_a_float_is_finite(kind, of_p, of_q):
    """Of a token whose probability underflows, or nearly, for one or for both."""
    log_p, log_q = (np.array([0.0, x], np.float32) for x in (of_p, of_q))
    value, weighted = outcomes(kind, 0.5, jnp.asarray(log_p), jnp.asarray(log_q))
    assert np.isfinite(value)
    assert np.isfinite(weighted).all()
    assert value < 1e-5


def test_masked_logits_have_no_gradient(inputs):
    """Logits of -∞, as where a vocabulary is padded, through the whole of the loss."""
    matrix = inputs["matrix"].copy()
    hidden = np.abs(inputs["hidden"])
    matrix[:, -2:] = -np.inf
    both = inputs | {"matrix": matrix, "hidden": hidden}
    both |= {"teacher": hidden, "teacher_matrix": matrix + 0.3 * inputs["matrix"]}
    both["labels"] = inputs["labels"] % (VOCAB - 2)
    for divergence in DIVERGENCES:
        config = DivergenceConfig(divergence, alpha=0.3)
        sums, (_, of_matrix) = found(config, both, chunk=4)
        assert np.isfinite([float(x) for x in sums]).all()
        assert np.isfinite(of_matrix).all()
        np.testing.assert_array_equal(of_matrix[:, -2:], 0)


def test_the_ends_of_jsd():
    """Divided by β it goes to the forward KL; by 1 - β to the reverse; and it jumps at the ends."""
    rng = np.random.default_rng(5)
    log_p, log_q = (jnp.asarray(log_softmax(rng.normal(size=9)), jnp.float32) for _ in range(2))
    forward, reverse = (outcomes(kind, 0.5, log_p, log_q)[0] for kind in DIVERGENCES[:2])
    near = 1e-3
    low, high = (outcomes("jsd", beta, log_p, log_q)[0] for beta in (near, 1 - near))
    np.testing.assert_allclose(low / near, forward, rtol=5e-3)
    np.testing.assert_allclose(high / near, reverse, rtol=5e-3)
    assert low < 0.01 * forward
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert DivergenceConfig("jsd", beta=beta).kind == kind


def test_coarser_outcomes_are_no_further_apart(inputs):
    """The log-sum inequality, which says what is lost by storing few tokens."""
    for name in ("forward", "reverse"):
        values = [float(found(CONFIGS[name], inputs, 0, k=k)[0].divergence) for k in (1, 4, 12, 0)]
        assert values == sorted(values)


def test_chunks_that_nobody_needs_are_not_computed(inputs, all_equations):
    hidden = jnp.asarray(inputs["hidden"], jnp.float32)
    matrix = jnp.asarray(inputs["matrix"], jnp.float32)
    teacher = teacher_of(inputs, DivergenceConfig())
    labels, weights = jnp.asarray(inputs["labels"]), jnp.asarray(inputs["weights"], jnp.float32)

    def loss(hidden, matrix):
        head = OutputHead(matrix)
        return divergence_sums(
            hidden, head, teacher, labels, weights, DivergenceConfig(), chunk=2
        ).loss

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, matrix)
    names = [equation.primitive.name for equation in all_equations(program.jaxpr)]
    assert "cond" in names
    assert names.count("dot_general") == 4  # two logits, and the student's two gradients


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence: must be one of"),
        ({"divergence": "jsd", "beta": 1.5}, "beta: must be from 0 to 1"),
        ({"beta": 0.3}, "beta: only jsd reads it"),
        ({"alpha": -0.1}, "alpha: must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature: must be positive"),
    ],
)
def test_wrong_options_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DivergenceConfig(), **fields)


@pytest.mark.parametrize("chunk", [3, 0])
def test_the_likeliest_tokens_are_found(chunk, inputs):
    hidden, matrix = (jnp.asarray(inputs[name], jnp.float32) for name in ("hidden", "matrix"))
    ids, log_probs = likeliest(hidden, OutputHead(matrix), 4, 1.5, chunk)
    expected = log_softmax(inputs["hidden"] @ inputs["matrix"] / 1.5)
    order = np.argsort(-expected, axis=-1)[..., :4]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(log_probs, np.take_along_axis(expected, order, -1), rtol=1e-5)
