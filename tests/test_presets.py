"""The presets of configs/pretrain.py: sizes, layouts, and compilation without memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm import command_line, trees
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models.families import architecture
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.objectives.next_token import next_token
from jaxllm.sharding.mesh import batch_sharding, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxllm.training.step import jit_step, make_train_step, state_shapes

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain.py"


def load(preset, *overrides):
    config = command_line.load_config(f"{CONFIG}:{preset}" if preset else str(CONFIG))
    command_line.override(config, ["--config.data.train=builtin:pydocs", *overrides])
    return from_dict(PretrainConfig, config)


def model_of(config):
    return architecture(config.model, config.tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # Llama 3 8B: Dubey et al. 2024 give 8.03 B; Llama 3.2 1B: its model card, 1.23 B.
        ("8b", 8_030_261_248),
        ("1b", 1_235_814_400),
        ("124m", 123_587_328),
        ("350m", 355_124_224),
        ("d12", 110_119_680),
    ],
)
def test_a_preset_has_the_size_of_its_name(preset, parameters):
    assert trees.size(param_shapes(model_of(load(preset)))) == parameters


@pytest.mark.parametrize("preset", ["8b", "1b"])
def test_every_parameter_of_a_large_preset_is_sharded_by_a_rule(preset):
    mesh = make_mesh(load(preset, "--config.mesh.fsdp=4", "--config.mesh.tensor=2").mesh)
    shapes = param_shapes(model_of(load(preset)))
    for (path, shape), (_, sharding) in zip(
        trees.leaves_with_paths(shapes),
        trees.leaves_with_paths(shardings(shapes, SHARDING_RULES, mesh)),
        strict=True,
    ):
        if "norm" not in path:
            shard = sharding.shard_shape(shape.shape)
            assert 8 * jnp.prod(jnp.array(shard)) == jnp.prod(jnp.array(shape.shape)), path


@pytest.mark.parametrize("preset", ["", "tiny", "d2", "d4", "d26", "124m", "350m", "1b", "8b"])
def test_every_preset_is_a_valid_configuration(preset):
    config = load(preset)
    assert model_of(config).layers == config.model.layers
    assert config.optimizer.warmup_steps < config.steps


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match=r"no preset 'huge'; it has :tiny, .*:8b and :dN"):
        command_line.load_config(f"{CONFIG}:huge")


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("1b", 1_235_814_400), pytest.param("8b", 8_030_261_248, marks=pytest.mark.slow)],
)
def test_a_large_train_step_compiles_for_eight_devices(preset, parameters):
    config = load(
        preset, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.micro_batch_size=8"
    )
    model, mesh = model_of(config), make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer)
    with jax.set_mesh(mesh):
        shapes = state_shapes(param_shapes(model), optimizer, SHARDING_RULES, mesh)
        row = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=batch_sharding(mesh))
        weights = jax.ShapeDtypeStruct((8, 2048), jnp.float32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
        step = make_train_step(
            next_token(model, config.objective),
            optimizer,
            learning_rate_schedule(config.optimizer, config.steps),
            micro_batches=1,
            seed=0,
        )
        lowered = jit_step(step, shapes, mesh).lower(shapes, {}, batch | {"loss_weights": weights})
        memory = lowered.compile().memory_analysis()
    # Parameters and two moments in float32, an eighth of them on each device (norms whole).
    state = 3 * 4 * parameters / 8
    assert state <= memory.argument_size_in_bytes < 1.01 * state
    # The state is donated: its buffers are those of the result.
    assert memory.alias_size_in_bytes >= state
