"""Factors of the learning rate by path: how they are written, and what is refused."""

import jax.numpy as jnp
import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.training.learning_rates import check_factors, factor_tree, parse_factors
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
