"""Factors of the learning rate by path: how they are written, and what is refused."""

import jax.numpy as jnp
import pytest

from jaxllm import trees
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models.transformer import param_shapes
from jaxllm.training.learning_rates import (
    check_factors,
    factor_tree,
    layer_factors,
    parse_factors,
)
from jaxllm.training.optimizer import OptimizerConfig

PARAMS = {
    "embedding": jnp.ones((3, 2)),
    "stack_0": {"norm": {"scale": jnp.ones(2)}, "mlp": {"kernel": jnp.ones((2, 2))}},
}


def test_the_first_pattern_that_matches_the_whole_path_counts():
    factors = parse_factors("embedding:0.1, .*norm/scale:2,stack_0/(?:norm|mlp)/.*:0,mlp:7")
    assert factors[0] == ("embedding", 0.1)
    assert factor_tree(factors, PARAMS) == {
        "embedding": 0.1,
        "stack_0": {"norm": {"scale": 2.0}, "mlp": {"kernel": 0.0}},
    }
    everywhere = {"embedding": 1.0, "stack_0": {"norm": {"scale": 1.0}, "mlp": {"kernel": 1.0}}}
    assert factor_tree(parse_factors(""), PARAMS) == everywhere


def test_each_layer_has_the_factor_of_its_depth(tiny_model):
    shapes = param_shapes(tiny_model(family="gemma3", layers=5, tied=False))
    found = layer_factors(0.5, shapes)
    assert set(found) == {path for path, _ in trees.leaves_with_paths(shapes)}
    assert found["embedding"] == 0.5**6
    assert found["output"] == found["final_norm/scale"] == 1
    # A unit of three and what is left of it: layers 0, 1, 2, and 3, 4.
    of_layers = [found[f"stack_0/layer_{n}/mlp/up/kernel"].item() for n in range(3)]
    of_layers += [found[f"stack_1/layer_{n}/mlp/up/kernel"].item() for n in range(2)]
    assert of_layers == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5]

    shapes = param_shapes(tiny_model(layers=3))
    found = layer_factors(0.5, shapes)
    assert found["stack_0/layer_0/mlp/up/kernel"].tolist() == [[[0.125]], [[0.25]], [[0.5]]]
    tree = factor_tree(parse_factors(".*up/kernel:2"), shapes, found)
    assert tree["stack_0"]["layer_0"]["mlp"]["up"]["kernel"].ravel().tolist() == [0.25, 0.5, 1]
    assert tree["embedding"] == 0.5**4
    assert layer_factors(1.0, shapes) == {}


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_decay_beyond_its_range_is_refused(decay):
    with pytest.raises(UserError, match=r"optimizer\.layer_decay: must be in \(0, 1\]"):
        from_dict(OptimizerConfig, {"layer_decay": decay}, "optimizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embedding", "'embedding' is not PATTERN:FACTOR"),
        ("embedding:1,", "'' is not PATTERN:FACTOR"),
        (":2", "':2' is not PATTERN:FACTOR"),
        ("(a:1", r"'\(a' is no regular expression \(missing \)"),
        ("a:-1", "the factor of 'a' must be a number of at least 0, and was given '-1'"),
        ("a:nan", "the factor of 'a' must be a number of at least 0, and was given 'nan'"),
        ("a:inf", "the factor of 'a' must be a number"),
        ("a:b", "the factor of 'a' must be a number of at least 0, and was given 'b'"),
    ],
)
def test_what_is_not_written_rightly_is_refused_with_the_field(text, message):
    with pytest.raises(UserError, match=rf"config\.optimizer\.learning_rates: {message}"):
        from_dict(OptimizerConfig, {"learning_rates": text}, "optimizer")


def test_a_pattern_that_matches_no_parameter_is_refused():
    check_factors(parse_factors("embedding:1,.*kernel:2"), PARAMS)
    with pytest.raises(UserError) as refused:
        check_factors(parse_factors("embedding:1,kernel:2"), PARAMS)
    assert str(refused.value) == (
        "config.optimizer.learning_rates: the pattern 'kernel' matches no parameter that is "
        "trained; the paths look like 'embedding', 'stack_0/mlp/kernel'."
    )
