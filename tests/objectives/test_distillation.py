"""Distillation as an objective: whose gradient it takes, and that a split changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.transformer import Transformer, output_head
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.distillation import TEACHER_TREE, distillation
from jaxllm.objectives.next_token import next_token
from jaxllm.ops.divergence import DivergenceConfig
from jaxllm.training.step import loss_and_gradients

SEQ = 12
CONFIG = DivergenceConfig("jsd", alpha=0.2, temperature=1.5)


@pytest.fixture(scope="module")
def models(tiny_model, tiny_params):
    """A student, a teacher twice as wide, and the parameters of both."""
    student, teacher = tiny_model(layers=2), tiny_model(layers=3, width=32, family="gemma2")
    return student, teacher, tiny_params(student), {TEACHER_TREE: tiny_params(teacher, 1)}


@pytest.fixture(scope="module")
def batch(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[7, 5], [9], [12], [3, 3]], SEQ))


@pytest.fixture(scope="module")
def evaluate(models):
    student, teacher, params, frozen = models

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def run(batch, config=CONFIG, parts=1, is_stored=False):
        objective = distillation(student, config, None if is_stored else teacher)
        beside = {} if is_stored else frozen
        return loss_and_gradients(objective, params, beside, batch, None, parts)

    return run


def test_a_split_batch_is_the_whole(batch, evaluate):
    whole = evaluate(batch)
    for found, expected in zip(
        jax.tree.leaves(evaluate(batch, CONFIG, 4)), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


def test_hard_labels_alone_are_next_token_prediction(models, batch, evaluate):
    student, _, params, _ = models
    found = evaluate(batch, DivergenceConfig(alpha=1.0))
    objective = next_token(student, CrossEntropyConfig())
    expected = loss_and_gradients(objective, params, {}, batch, None, 1)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[2]["loss"], expected[2]["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_rows_that_only_one_of_both_has_are_left_out(models, batch, evaluate, tiny_params):
    """As published vocabularies are padded; the others are compared as if there were none."""
    student, teacher, params, frozen = models
    expected = evaluate(batch)
    for wider in ("student", "teacher"):
        one = dataclasses.replace(student, vocab_size=student.vocab_size + 7 * (wider == "student"))
        other = dataclasses.replace(
            teacher, vocab_size=teacher.vocab_size + 7 * (wider == "teacher")
        )
        own, beside = dict(params), dict(frozen[TEACHER_TREE])
        tree = own if wider == "student" else beside
        tree["embedding"] = jnp.pad(tree["embedding"], ((0, 7), (0, 0)), constant_values=3.0)
        objective = distillation(one, CONFIG, other)
        found = loss_and_gradients(objective, own, {TEACHER_TREE: beside}, batch, None, 1)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        gradient = found[1]["embedding"][: student.vocab_size]
        np.testing.assert_allclose(gradient, expected[1]["embedding"], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(found[1]["embedding"][student.vocab_size :], 0)


def test_what_stands_where_the_weight_is_0_does_not_matter(batch, evaluate):
    expected = evaluate(batch)
    chosen = batch["loss_weights"] > 0
    changed = batch | {"targets": jnp.where(chosen, batch["targets"], 7)}
    for one, other in zip(
        jax.tree.leaves(evaluate(changed)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    half = batch | {"loss_weights": batch["loss_weights"].at[:, 5:].set(0)}
    assert abs(float(evaluate(half)[0] - expected[0])) > 1e-3


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_what_a_teacher_has_said_is_as_good_as_asking_it(divergence, models, batch, evaluate):
    """All its tokens; of a few it is the coarser divergence (tests/ops/test_divergence.py)."""
    _, teacher, _, frozen = models
    params = frozen[TEACHER_TREE]
    hidden = jax.jit(Transformer(teacher).apply)(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    ).hidden
    head = output_head(teacher, params)
    scores = head.soft_cap * jnp.tanh(hidden @ head.matrix / head.soft_cap)
    config = DivergenceConfig(divergence, temperature=1.5)
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(scores / 1.5), scores.shape[-1])
    said = batch | {"teacher_ids": ids, "teacher_log_probs": log_probs}
    live, stored = evaluate(batch, config), evaluate(said, config, 1, True)
    np.testing.assert_allclose(stored[0], live[0], rtol=1e-4)
    for one, other in zip(jax.tree.leaves(stored[1]), jax.tree.leaves(live[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-3, atol=2e-4)


def test_it_is_causal(models, batch, evaluate):
    """No token is told of what follows it: neither by the student, nor by the teacher."""
    early = batch | {"loss_weights": batch["loss_weights"].at[:, 4:].set(0)}
    later = early | {"tokens": early["tokens"].at[:, 6:].set(3)}
    np.testing.assert_allclose(evaluate(later)[0], evaluate(early)[0], rtol=1e-6)


def test_the_teacher_is_not_differentiated(models, batch):
    """Its forward pass is there once, and nothing of it goes back."""
    student, teacher, params, frozen = models
    objective = distillation(student, CONFIG, teacher)

    def loss(frozen):
        return sum(jax.tree.leaves(objective.sums(params, batch, frozen, None)[0]))

    for leaf in jax.tree.leaves(jax.grad(loss)(frozen)):
        np.testing.assert_array_equal(leaf, 0)
