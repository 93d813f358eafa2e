"""What dtypes a train step in bfloat16 computes in, read from its program."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models.families import FAMILIES
from jaxllm.models.transformer import param_shapes
from jaxllm.objectives.next_token import NextTokenConfig, next_token
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import make_train_step

SEQ = 8


def program(model, packed_rows, **optimizer):
    """The StableHLO of a step with two micro-batches."""
    config = OptimizerConfig(**optimizer)
    made = make_optimizer(config)
    step = make_train_step(
        next_token(model, NextTokenConfig(z_loss=0.1, label_smoothing=0.1)),
        made,
        learning_rate_schedule(config, 10),
        micro_batches=2,
        seed=0,
    )
    shapes = param_shapes(model)
    state = jax.eval_shape(lambda params: new_state(params, made.init(params)), shapes)
    batch = jax.tree.map(jnp.asarray, packed_rows([[5, 3], [SEQ]], SEQ))
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


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "xla") for family in FAMILIES), ("llama", "chunked"), ("gemma2", "chunked")],
)
def test_every_product_of_a_bfloat16_step_has_bfloat16_operands(
    family, attention, tiny_model, packed_rows
):
    model = tiny_model(family=family, dtype="bfloat16", attention=attention)
    text = program(model, packed_rows)
    assert products(text) == {"bf16"}
    assert "f64" not in text


def test_a_float32_step_has_no_narrow_product_and_nothing_wider(tiny_model, packed_rows):
    text = program(tiny_model(), packed_rows)
    assert products(text) == {"f32"}
    assert "f64" not in text
    assert "bf16" not in text


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_no_optimizer_computes_in_float64(name, tiny_model, packed_rows):
    assert "f64" not in program(tiny_model(dtype="bfloat16"), packed_rows, name=name)
