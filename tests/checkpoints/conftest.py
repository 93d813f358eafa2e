"""A checkpointer of small items that are told by their step, and the warnings it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints.checkpointer import Checkpointer


class StepCheckpointer(Checkpointer):
    """Saves and restores what is made from the number of a step."""

    @staticmethod
    def params(step):
        values = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
        return {"layer": {"kernel": jnp.asarray(values)}, "scale": jnp.full(7, step, jnp.float32)}

    @staticmethod
    def progress(step):
        return {"step": jnp.int32(step), "extra": {}}

    @staticmethod
    def shapes(tree):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)

    def begin_step(self, step):
        self.save(step, self.params(step), self.progress(step))

    def save_steps(self, *steps):
        """Saves one after the other, and waits."""
        for step in steps:
            self.begin_step(step)
        self.wait()

    def restored_step(self):
        """The step that is restored, all of it as it was saved; None if there is none."""
        found = self.restore(self.shapes(self.params(0)), self.shapes(self.progress(0)))
        if found is None:
            return None
        step, params, progress = found
        jax.tree.map(np.testing.assert_array_equal, params, self.params(step))
        assert progress["step"] == step
        assert progress["extra"] == {}
        return step

    def read_params(self):
        return self.restore_params(self.shapes(self.params(0)))


class Warnings(list):
    def __call__(self, message):
        self.append(message)


@pytest.fixture
def warnings():
    return Warnings()


@pytest.fixture
def open_checkpointer(tmp_path, warnings):
    opened = []

    def make(keep=2, **options):
        opened.append(StepCheckpointer(tmp_path / "checkpoints", keep, warn=warnings, **options))
        return opened[-1]

    yield make
    for checkpointer in opened:
        checkpointer.close()
