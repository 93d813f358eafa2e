"""What dtypes a train step in bfloat16 computes in, read from its program."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models.families import FAMILIES
from jaxllm.models.transformer import param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import make_train_step

SEQ = 8


def program(model, packed_rows, **optimizer):
    """The StableHLO of a step with two micro-batches.

    It is made with float64 allowed, so that a number that slips into it shows.
    """
    config = OptimizerConfig(**optimizer)
    made = make_optimizer(config)
    step = make_train_step(
        next_token(model, CrossEntropyConfig(z_loss=0.1, label_smoothing=0.1)),
        made,
        learning_rate_schedule(config, 10),
        micro_batches=2,
        seed=0,
    )
    shapes = param_shapes(model)
    state = jax.eval_shape(lambda params: new_state(params, made.init(params)), shapes)
    batch = jax.tree.map(jnp.asarray, packed_rows([[5, 3], [SEQ]], SEQ))
    with jax.enable_x64(True):
        return jax.jit(step).lower(state, {}, batch).as_text()


def products(text):
    """The dtypes of the operands of every matrix product."""
    lines = [line for line in text.splitlines() if re.search(r"dot_general|ragged_dot", line)]
    assert len(lines) > 10
    return {
        dtype
        for line in lines
        for dtype in re.findall(r"x([a-z]+\d+)>", re.search(r": \((.*)\) ->", line)[1])
    }


def sums(text):
    """The dtypes of all sums over elements: reductions, and additions at indices."""
    reductions = re.findall(r"reduce\(.* applies stablehlo\.add .*-> tensor<(.*)>", text)
    # The operation of a scatter stands two lines below its name.
    scatters = re.findall(
        r'"stablehlo\.scatter"(?:.*\n){2}.*stablehlo\.add .* : tensor<(.*)>', text
    )
    assert len(reductions) > 10
    assert scatters
    return {shape.rsplit("x", 1)[-1] for shape in (*reductions, *scatters)} - {"i32", "i64"}


def is_nowhere_float64(text):
    """Whether no array is: of scalars some are, as long as float64 is allowed."""
    return not re.search(r"\dx\d+xf64", text)


@pytest.mark.parametrize(
    ("family", "attention", "params"),
    [
        *((family, "xla", "bfloat16") for family in FAMILIES),
        ("gpt2", "chunked", "float32"),
        ("gemma2", "chunked", "float32"),
        ("mixtral", "xla", "float32"),
    ],
)
def test_a_bfloat16_step_multiplies_in_bfloat16_and_sums_in_float32(
    family, attention, params, tiny_model, packed_rows
):
    model = tiny_model(family=family, dtype="bfloat16", attention=attention, param_dtype=params)
    text = program(model, packed_rows)
    assert products(text) == {"bf16"}
    assert "bf16" not in sums(text)
    assert is_nowhere_float64(text)


def test_a_float32_step_has_no_narrow_product_and_nothing_wider(tiny_model, packed_rows):
    text = program(tiny_model(), packed_rows)
    assert products(text) == {"f32"}
    assert "bf16" not in text
    assert is_nowhere_float64(text)


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_no_optimizer_computes_in_float64(name, tiny_model, packed_rows):
    assert is_nowhere_float64(program(tiny_model(dtype="bfloat16"), packed_rows, name=name))
