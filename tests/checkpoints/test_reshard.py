"""A checkpoint of one mesh restored on another: equal bit for bit, and training goes on alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.models.transformer import SHARDING_RULES, init_params, param_shapes
from jaxllm.objectives.next_token import NextTokenConfig, next_token
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.rules import with_shardings
from jaxllm.training.loop import checkpoint_items
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.step import init_state, jit_step, make_train_step, state_shapes

_VOCABULARY = 64


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(_VOCABULARY, layers=2)


@pytest.fixture(scope="module")
def batches(packed_rows):
    return [packed_rows([[9, 7], [16], [5, 5, 5], [12]] * 2, 16, _VOCABULARY, s) for s in range(4)]


class Trainer:
    """The train step on the first devices, as many as the mesh asks for."""

    def __init__(self, model, config: MeshConfig, devices: int):
        self.mesh = make_mesh(config, jax.devices()[:devices])
        self.optimizer = make_optimizer(OptimizerConfig())
        self.shapes = with_shardings(param_shapes(model), SHARDING_RULES, self.mesh)
        self.layout = state_shapes(self.shapes, self.optimizer, SHARDING_RULES, self.mesh)
        step = make_train_step(
            next_token(model, NextTokenConfig()),
            self.optimizer,
            lambda step: jnp.float32(1e-2),
            micro_batches=1,
            seed=0,
        )
        self._step = jit_step(step, self.layout, self.mesh)
        self._model = model

    def fresh(self):
        shardings = jax.tree.map(lambda shape: shape.sharding, self.shapes)
        make = jax.jit(lambda key: init_params(self._model, key), out_shardings=shardings)
        return init_state(make(jax.random.key(0)), self.optimizer, self.layout)

    def step(self, state, batch):
        with jax.set_mesh(self.mesh):
            batch = jax.device_put(batch, batch_sharding(self.mesh))
            state, metrics = self._step(state, {}, batch)
            return state, float(metrics["loss"])

    def restore(self, folder):
        checkpointer = Checkpointer(folder, 1, read_only=True)
        step, params, progress = checkpointer.restore(*checkpoint_items(self.layout, {}))
        checkpointer.close()
        return step, TrainState(params=params, **progress)


@pytest.fixture(
    scope="module", params=[MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)], ids=["fsdp8", "2x2x2"]
)
def saved(request, model, batches, tmp_path_factory):
    """A checkpoint of three steps on eight devices, its state, and the loss of the next step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = Trainer(model, request.param, 8)
    with jax.set_mesh(trainer.mesh):
        state = trainer.fresh()
    for batch in batches[:3]:
        state, _ = trainer.step(state, batch)
    checkpointer = Checkpointer(folder, 1)
    checkpointer.save(3, *checkpoint_items(state, {}))
    checkpointer.close()
    kept = jax.device_get(state)
    return folder, kept, trainer.step(state, batches[3])[1]


@pytest.mark.parametrize(
    ("config", "devices"),
    [(MeshConfig(1, 8, 1), 8), (MeshConfig(1, 2, 2), 4), (MeshConfig(4, 1, 1), 4), (MeshConfig(), 1)],
    ids=["8", "4 sharded", "4 replicated", "1"],
)
def test_a_checkpoint_fits_any_mesh(model, batches, saved, config, devices):
    folder, before, next_loss = saved
    trainer = Trainer(model, config, devices)
    step, state = trainer.restore(folder)
    assert step == state.step == 3
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.layout), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert trainer.step(state, batches[3])[1] == pytest.approx(next_loss, abs=1e-5)
