"""Checkpoints: which stay, and what happens when one is broken or the disk is full."""

import errno
import logging
import os
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from jaxllm.checkpoints import checkpointer as checkpointer_module
from jaxllm.checkpoints.checkpointer import CheckpointConfig, Checkpointer
from jaxllm.errors import Preempted, UserError


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
        opened.append(Checkpointer(tmp_path / "checkpoints", keep, warn=warnings, **options))
        return opened[-1]

    yield make
    for checkpointer in opened:
        checkpointer.close()


def _params(step):
    values = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    return {"layer": {"kernel": jnp.asarray(values)}, "scale": jnp.full(7, step, jnp.float32)}


def _progress(step):
    return {"step": jnp.int32(step), "extra": {}}


def _save(checkpointer, *steps):
    for step in steps:
        checkpointer.save(step, _params(step), _progress(step))
    checkpointer.wait()
    checkpointer._summing.join()


def _shapes(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)


def _restore(checkpointer):
    found = checkpointer.restore(_shapes(_params(0)), _shapes(_progress(0)))
    if found is None:
        return None
    step, params, progress = found
    jax.tree.map(np.testing.assert_array_equal, params, _params(step))
    assert progress["step"] == step
    assert progress["extra"] == {}
    return step


def _break(folder, share=0.5):
    """Truncates the largest file under a checkpoint, where the values are; with no checksums it is
    Orbax that has to find it."""
    for path in folder.glob("checksums.*"):
        path.unlink()
    largest = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, int(largest.stat().st_size * share))


def test_what_is_saved_is_restored(open_checkpointer):
    checkpointer = open_checkpointer()
    assert _restore(checkpointer) is None
    _save(checkpointer, 3)
    assert _restore(checkpointer) == 3
    assert _restore(open_checkpointer()) == 3


def test_the_arrays_may_be_donated_once_save_has_returned(open_checkpointer):
    checkpointer = open_checkpointer()
    params = _params(5)
    checkpointer.save(5, params, _progress(5))
    jax.tree.map(lambda array: array.delete(), params)
    checkpointer.wait()
    assert _restore(checkpointer) == 5


@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(open_checkpointer, keep, kept):
    checkpointer = open_checkpointer(keep)
    _save(checkpointer, 1, 2, 3, 4, 5)
    assert checkpointer.steps() == kept


def test_the_best_stays_until_there_is_a_better_one(open_checkpointer):
    checkpointer = open_checkpointer(1)
    _save(checkpointer, 1)
    checkpointer.mark_best(1)
    _save(checkpointer, 2, 3)
    assert checkpointer.steps() == [1, 3]
    checkpointer.mark_best(3)
    _save(checkpointer, 4)
    assert checkpointer.steps() == [3, 4]


def test_the_best_is_the_first_in_order_that_has_a_checkpoint(open_checkpointer):
    checkpointer = open_checkpointer(1)
    _save(checkpointer, 1, 2)
    checkpointer.mark_best(7, 2, 1)  # the save of 7 failed, and 1 is dropped already
    _save(checkpointer, 3, 4)
    assert checkpointer.steps() == [2, 4]


def test_a_step_that_is_saved_is_left_alone(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer()
    _save(checkpointer, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpointer.save(1, _params(2), _progress(2))
    checkpointer.wait()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(
    open_checkpointer, warnings, tmp_path, share
):
    _save(open_checkpointer(3), 1, 2, 3)
    for step in (2, 3):
        _break(tmp_path / "checkpoints" / str(step), share)
    checkpointer = open_checkpointer(3)
    assert _restore(checkpointer) == 1
    assert [message.split(" (")[0] for message in warnings] == [
        "checkpoint 3 cannot be read",
        "checkpoint 2 cannot be read",
    ]
    assert checkpointer.steps() == [1]
    assert (tmp_path / "checkpoints" / "broken-3").is_dir()
    # The step comes again, and breaks again.
    _save(checkpointer, 3)
    assert checkpointer.steps() == [1, 3]
    _break(tmp_path / "checkpoints" / "3", share)
    assert _restore(open_checkpointer(3)) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        "params/manifest.ocdbt",
        "params/_METADATA",
        "params/ocdbt.process_0/manifest.ocdbt",
        "progress/manifest.ocdbt",
        "progress/_METADATA",
    ],
)
def test_any_damaged_file_is_survived(open_checkpointer, warnings, tmp_path, pattern):
    _save(open_checkpointer(), 1, 2)
    (damaged,) = (tmp_path / "checkpoints" / "2").glob(pattern)
    os.truncate(damaged, damaged.stat().st_size // 2)
    # Either the file was not needed, and all values are right, or the one before is used.
    step = _restore(open_checkpointer())
    assert step == 2 - len(warnings)


def test_an_item_that_is_missing_is_survived(open_checkpointer, warnings, tmp_path):
    _save(open_checkpointer(), 1, 2)
    (tmp_path / "checkpoints" / "2" / "progress").rename(tmp_path / "elsewhere")
    assert _restore(open_checkpointer()) == 1
    assert len(warnings) == 1


def test_all_broken_is_told(open_checkpointer, tmp_path):
    _save(open_checkpointer(), 1, 2)
    for step in (1, 2):
        _break(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"none of its checkpoints can be read"):
        _restore(open_checkpointer())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_half_written_checkpoint_is_passed_over_and_removed(open_checkpointer, tmp_path):
    _save(open_checkpointer(), 1)
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (leftover / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (leftover / "params.orbax-checkpoint-tmp" / "d").write_bytes(b"part")
    read_only = open_checkpointer(read_only=True)
    assert _restore(read_only) == 1
    assert leftover.is_dir()
    checkpointer = open_checkpointer()
    assert _restore(checkpointer) == 1
    assert not leftover.exists()
    _save(checkpointer, 2)
    assert checkpointer.steps() == [1, 2]


def test_read_only_changes_nothing_even_beside_a_broken_checkpoint(
    open_checkpointer, warnings, tmp_path
):
    _save(open_checkpointer(3), 1, 2, 3)
    _break(tmp_path / "checkpoints" / "3")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpointer = open_checkpointer(1, read_only=True)
    assert _restore(checkpointer) == 2
    step, params = checkpointer.restore_params(_shapes(_params(0)))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, _params(2))
    checkpointer.close()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_parameters_alone_can_be_read(open_checkpointer):
    checkpointer = open_checkpointer()
    assert checkpointer.restore_params(_shapes(_params(0))) is None
    _save(checkpointer, 4)
    step, params = checkpointer.restore_params(_shapes(_params(0)))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, _params(4))


def test_a_model_of_another_shape_is_refused(open_checkpointer):
    checkpointer = open_checkpointer()
    _save(checkpointer, 1)
    wider = jax.tree.map(lambda a: jnp.zeros((*a.shape, 2)), _params(0))
    with pytest.raises(UserError, match="can be read for this model"):
        checkpointer.restore(_shapes(wider), _shapes(_progress(0)))
    assert checkpointer.steps() == [1]


def test_a_signal_while_restoring_does_not_make_a_checkpoint_broken(
    open_checkpointer, warnings, monkeypatch
):
    checkpointer = open_checkpointer()
    _save(checkpointer, 1, 2)

    def stopped(*args, **kwargs):
        raise Preempted("stopped by SIGTERM")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._orbax, "restore", stopped)
        with pytest.raises(Preempted):
            _restore(checkpointer)
    assert warnings == []
    assert checkpointer.steps() == [1, 2]


def test_a_flipped_bit_is_found_which_orbax_does_not_see(open_checkpointer, warnings, tmp_path):
    _save(open_checkpointer(3), 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    largest = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert _restore(open_checkpointer(3)) == 1
    (warning,) = warnings
    assert f"{largest.relative_to(newest)} has changed since it was written" in warning
    assert (tmp_path / "checkpoints" / "broken-2").is_dir()


def test_a_store_that_does_not_answer_is_asked_again(open_checkpointer, warnings, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01, 0.01))
    checkpointer = open_checkpointer()
    _save(checkpointer, 1, 2)
    restore, calls = checkpointer._orbax.restore, []

    def outage(*args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return restore(*args, **kwargs)

    monkeypatch.setattr(checkpointer._orbax, "restore", outage)
    assert _restore(checkpointer) == 2
    assert [path.name for (path,) in calls] == ["2", "2", "2"]
    assert all("checkpoint 2 cannot be read now" in warning for warning in warnings)
    assert checkpointer.steps() == [1, 2]


def test_a_save_that_failed_is_due_again_after_longer_and_longer(
    open_checkpointer, warnings, monkeypatch
):
    now = 0.0
    monkeypatch.setattr(checkpointer_module, "time", types.SimpleNamespace(monotonic=lambda: now))
    checkpointer = open_checkpointer()
    assert not checkpointer.is_due_again()

    def down(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.AsyncCheckpointer, "save", down)
        for seconds in (5, 10, 20, 40, 80, 80):
            checkpointer.save(1, _params(1), _progress(1))
            assert f"tried again after {seconds} seconds" in warnings[-1]
            now += seconds - 1
            assert not checkpointer.is_due_again()
            now += 1
            assert checkpointer.is_due_again()
    _save(checkpointer, 1)
    assert not checkpointer.is_due_again()
    assert checkpointer.steps() == [1]


def test_checkpoints_that_were_all_set_aside_are_no_new_beginning(open_checkpointer, tmp_path):
    _save(open_checkpointer(), 1)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "broken-1")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        _restore(open_checkpointer())


def test_the_last_save_is_tried_again_until_it_is_there(open_checkpointer, warnings, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01, 0.01))
    checkpointer, save, calls = open_checkpointer(), ocp.AsyncCheckpointer.save, []

    def down(self, *args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down)
    checkpointer.save(7, _params(7), _progress(7))
    checkpointer.finish(7, lambda: checkpointer.save(7, _params(7), _progress(7)))
    assert checkpointer.steps() == [7]
    assert len(warnings) == 2


def test_a_last_save_that_never_succeeds_is_to_be_run_again(open_checkpointer, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01))
    checkpointer = open_checkpointer()

    def down(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down)
    checkpointer.save(8, _params(8), _progress(8))
    with pytest.raises(Preempted, match="checkpoint 8, the last, could not be written"):
        checkpointer.finish(8, lambda: checkpointer.save(8, _params(8), _progress(8)))


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_costs_one_checkpoint(open_checkpointer, warnings, monkeypatch, method):
    checkpointer = open_checkpointer(1)
    _save(checkpointer, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._orbax, method, full)
        _save(checkpointer, 2)
        assert "checkpoint 2 could not be written" in warnings[0]
        assert "No space left on device" in warnings[0]
        assert "training goes on" in warnings[0]
    assert 1 in checkpointer.steps()
    _save(checkpointer, 3)
    assert checkpointer.steps() == [3]
    assert _restore(checkpointer) == 3
    assert len(warnings) == 1


_LIMITED = """
    import resource, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from jaxllm.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(Path(sys.argv[1]), 1)

    def save(step):
        values = jax.random.normal(jax.random.key(step), (512, 512))
        checkpointer.save(step, {"values": values}, {"step": jnp.int32(step)})
        NOTICE
        print(step, checkpointer.steps(), flush=True)

    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    save(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(3)
    checkpointer.close()
"""


@pytest.mark.parametrize(
    "notice", ["checkpointer.wait()", "while checkpointer._saving: checkpointer.is_due_again()"]
)
def test_a_file_that_really_cannot_be_written(tmp_path, notice):
    """The operating system refuses files over 100 kB: the error comes from Orbax's own writer."""
    script = textwrap.dedent(_LIMITED).replace("NOTICE", notice)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "checkpoints")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["1 [1]", "2 [1]", "3 [3]"]
    assert "warning: checkpoint 2 could not be written" in run.stderr
    assert "Traceback" not in run.stderr


def test_orbax_is_quiet_and_others_are_not(caplog):
    with caplog.at_level(logging.DEBUG, logger="absl"):
        absl_logging.warning("the disk is full")
        record = logging.LogRecord("absl", logging.WARNING, "/x/orbax/y.py", 1, "saved", (), None)
        logging.getLogger("absl").handle(record)
    assert caplog.messages == ["the disk is full"]


@pytest.mark.parametrize("fields", [{"every": 0}, {"keep": 0}])
def test_the_configuration_is_checked(fields):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointConfig(**fields)
