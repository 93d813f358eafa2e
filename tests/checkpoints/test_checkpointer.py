"""Checkpoints: what is saved is restored, and which stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints.checkpointer import CheckpointConfig
from jaxllm.errors import UserError


def test_what_is_saved_is_restored(open_checkpointer):
    checkpointer = open_checkpointer()
    assert checkpointer.restored_step() is None
    checkpointer.save_steps(3)
    assert checkpointer.restored_step() == 3
    assert open_checkpointer().restored_step() == 3


def test_the_arrays_may_be_donated_once_save_has_returned(open_checkpointer):
    checkpointer = open_checkpointer()
    params = checkpointer.params(5)
    checkpointer.save(5, params, checkpointer.progress(5))
    jax.tree.map(lambda array: array.delete(), params)
    checkpointer.wait()
    assert checkpointer.restored_step() == 5


@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(open_checkpointer, keep, kept):
    checkpointer = open_checkpointer(keep)
    checkpointer.save_steps(1, 2, 3, 4, 5)
    assert checkpointer.steps() == kept


def test_the_best_stays_until_there_is_a_better_one(open_checkpointer):
    checkpointer = open_checkpointer(1)
    checkpointer.save_steps(1)
    checkpointer.mark_best(1)
    checkpointer.save_steps(2, 3)
    assert checkpointer.steps() == [1, 3]
    checkpointer.mark_best(3)
    checkpointer.save_steps(4)
    assert checkpointer.steps() == [3, 4]


def test_the_best_is_the_first_in_order_that_has_a_checkpoint(open_checkpointer):
    checkpointer = open_checkpointer(1)
    checkpointer.save_steps(1, 2)
    checkpointer.mark_best(7, 2, 1)  # the save of 7 failed, and 1 is dropped already
    checkpointer.save_steps(3, 4)
    assert checkpointer.steps() == [2, 4]


def test_a_step_that_is_saved_is_left_alone(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer()
    checkpointer.save_steps(1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpointer.save(1, checkpointer.params(2), checkpointer.progress(2))
    checkpointer.wait()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_parameters_alone_can_be_read(open_checkpointer):
    checkpointer = open_checkpointer()
    assert checkpointer.read_params() is None
    checkpointer.save_steps(4)
    step, params = checkpointer.read_params()
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, checkpointer.params(4))


def test_a_model_of_another_shape_is_refused(open_checkpointer):
    checkpointer = open_checkpointer()
    checkpointer.save_steps(1)
    wider = jax.tree.map(lambda a: jnp.zeros((*a.shape, 2)), checkpointer.params(0))
    progress = checkpointer.shapes(checkpointer.progress(0))
    with pytest.raises(UserError, match="can be read for this model"):
        checkpointer.restore(checkpointer.shapes(wider), progress)
    assert checkpointer.steps() == [1]


@pytest.mark.parametrize("fields", [{"every": 0}, {"keep": 0}])
def test_the_configuration_is_checked(fields):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointConfig(**fields)
