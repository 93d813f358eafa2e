"""Matching of inner states as terms of distillation: which layers, whose gradient, and that a split
changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.objectives.distillation import TEACHER_TREE, distillation
from jaxllm.objectives.matching import PROJECTIONS, MatchingConfig, init_projections
from jaxllm.ops.divergence import DivergenceConfig
from jaxllm.training.step import loss_and_gradients

MATCHING = MatchingConfig(hidden_coef=0.5, attention_coef=2.0)


@pytest.fixture(scope="module")
def models(tiny_model):
    """A student, and a teacher that is wider, has more heads, and windows in half of its layers."""
    return tiny_model(layers=2), tiny_model(layers=4, width=32, heads=4, family="gemma2", window=4)


@pytest.fixture(scope="module")
def batch(packed_rows):
    return jax.tree.map(jnp.asarray, packed_rows([[7, 5], [9], [12], [3, 3]], 12))


@pytest.fixture(scope="module")
def evaluate(models, tiny_params):
    student, teacher = models
    matching = MATCHING.of(*models)
    params = tiny_params(student) | init_projections(matching, *models, jax.random.key(0))
    frozen = {TEACHER_TREE: tiny_params(teacher, 1)}
    objective = distillation(student, DivergenceConfig(), teacher, matching)

    @functools.partial(jax.jit, static_argnums=1)
    def run(batch, parts=1):
        return loss_and_gradients(objective, params, frozen, batch, None, parts)

    return run


@pytest.mark.parametrize(
    ("layer_map", "layers", "pairs"),
    [
        ("", (2, 4), [(0, 1), (1, 3)]),
        ("", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("", (2, 5), [(0, 2), (1, 4)]),
        ("", (3, 2), [(0, 0), (1, 1), (2, 1)]),
        ("1:1, 3:2", (3, 2), [(0, 0), (2, 1)]),
    ],
)
def test_which_layers_are_paired(layer_map, layers, pairs, tiny_model):
    models = [tiny_model(layers=number) for number in layers]
    assert MatchingConfig(layer_map=layer_map).of(*models).pairs == pairs


@pytest.mark.parametrize("layer_map", ["1", "1:", "a:1", "1:2;2:3", "0:1", "1:0", "2:1,1:2", ","])
def test_what_is_no_map(layer_map):
    with pytest.raises(ValueError, match="layer_map"):
        MatchingConfig(layer_map=layer_map)


@pytest.mark.parametrize(("layer_map", "whose"), [("3:1", "student"), ("1:5", "teacher")])
def test_a_layer_that_there_is_not_is_named(layer_map, whose, models):
    with pytest.raises(UserError, match=f"the {whose} has . layers, and layer . is named"):
        MatchingConfig(layer_map=layer_map).of(*models)


def test_a_split_batch_is_the_whole(batch, evaluate):
    whole = evaluate(batch)
    assert {"hidden_error", "attention_divergence"} < set(whole[2])
    for found, expected in zip(
        jax.tree.leaves(evaluate(batch, 4)), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=5e-4, atol=5e-6)


def test_terms_count_by_their_coefficients(batch, evaluate):
    loss, _, metrics = evaluate(batch)
    # Divided by a layer each: the mean of two.
    expected = (
        metrics["divergence"] + 0.5 * metrics["hidden_error"] + 2 * metrics["attention_divergence"]
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_students_learn_of_each_term(models, batch, tiny_params):
    student, teacher = models
    frozen = {TEACHER_TREE: tiny_params(teacher, 1)}
    for config in (MatchingConfig(hidden_coef=1.0), MatchingConfig(attention_coef=1.0)):
        matching = config.of(*models)
        whole = tiny_params(student) | init_projections(matching, *models, jax.random.key(0))
        objective = distillation(student, DivergenceConfig(), teacher, matching)
        (term,) = matching.coefficients

        @jax.jit
        @jax.grad
        def slope(params, term=term, objective=objective):
            return objective.sums(params, batch, frozen, None)[0][term]

        found = dict(trees.leaves_with_paths(slope(whole)))
        # What reads the last layer is no part of it, nor are its MLP and values of where it looks.
        moved = {path.split("/")[0] for path, leaf in found.items() if np.abs(leaf).max() > 0}
        assert moved == {"embedding", "stack_0", PROJECTIONS}
        assert np.abs(found["stack_0/layer_0/attention/key/kernel"]).max() > 0


def test_projections_learn_and_what_stands_where_the_weight_is_0_does_not_matter(batch, evaluate):
    gradients = evaluate(batch)[1]
    for path, gradient in trees.leaves_with_paths(gradients[PROJECTIONS]):
        assert all(np.abs(of_pair).max() > 0 for of_pair in np.asarray(gradient)), path
    early = batch | {"loss_weights": batch["loss_weights"].at[:, 4:].set(0)}
    later = early | {"tokens": early["tokens"].at[:, 6:].set(3)}
    np.testing.assert_allclose(evaluate(later)[0], evaluate(early)[0], rtol=1e-6)


def test_a_student_that_is_its_teacher_loses_nothing(models, batch, tiny_params):
    student, _ = models
    params = tiny_params(student)
    matching = MATCHING.of(student, student)
    objective = distillation(student, DivergenceConfig(), student, matching)
    whole = params | init_projections(matching, student, student, jax.random.key(0))
    frozen = {TEACHER_TREE: params}
    sums, _ = jax.jit(objective.sums, static_argnums=3)(whole, batch, frozen, None)
    for term, found in sums.items():
        np.testing.assert_allclose(found, 0, atol=1e-4, err_msg=term)

    def loss(frozen):
        return sum(jax.tree.leaves(objective.sums(whole, batch, frozen, None)[0]))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(frozen)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_no_coefficient(value):
    for name in ("hidden_coef", "attention_coef"):
        with pytest.raises(ValueError, match=f"{name}: must be a number from 0 on"):
            MatchingConfig(**{name: value})
