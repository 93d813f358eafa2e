"""A checkpoint of one mesh restored on another: equal bit for bit, and training goes on alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.models.transformer import SHARDING_RULES, init_params, param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.rules import with_shardings
from jaxllm.training.loop import checkpoint_items
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.step import init_state, jit_step, make_train_step, state_shapes

_VOCABULARY = 64


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(_VOCABULARY, layers=1)


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
            next_token(model, CrossEntropyConfig()),
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


@pytest.mark.parametrize(
    ("before", "after", "devices"),
    [
        (MeshConfig(1, 8, 1), MeshConfig(1, 2, 2), 4),
        pytest.param(MeshConfig(2, 2, 2), MeshConfig(), 1, marks=pytest.mark.slow),
    ],
    ids=["fsdp 8 to fsdp 2 x tensor 2", "2 x 2 x 2 to one device"],
)
def test_a_checkpoint_of_eight_devices_fits_fewer(model, batches, tmp_path, before, after, devices):
    trainer = Trainer(model, before, 8)
    with jax.set_mesh(trainer.mesh):
        state = trainer.fresh()
    for batch in batches[:3]:
        state, _ = trainer.step(state, batch)
    checkpointer = Checkpointer(tmp_path, 1)
    checkpointer.save(3, *checkpoint_items(state, {}))
    checkpointer.close()
    saved = jax.device_get(state)
    _, next_loss = trainer.step(state, batches[3])

    other = Trainer(model, after, devices)
    step, state = other.restore(tmp_path)
    assert step == state.step == 3
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(state))
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(other.layout), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert other.step(state, batches[3])[1] == pytest.approx(next_loss, abs=1e-5)
