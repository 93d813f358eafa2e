"""A full disk, and a store that does not answer: what is tried again, and when."""

import errno
import logging
import os
import subprocess
import sys
import textwrap
import types

import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from jaxllm.checkpoints import checkpointer as checkpointer_module
from jaxllm.errors import Preempted


def test_a_store_that_does_not_answer_is_asked_again(open_checkpointer, warnings, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01, 0.01))
    checkpointer = open_checkpointer()
    checkpointer.save_steps(1, 2)
    restore, calls = checkpointer._orbax.restore, []

    def outage(*args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return restore(*args, **kwargs)

    monkeypatch.setattr(checkpointer._orbax, "restore", outage)
    assert checkpointer.restored_step() == 2
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
            checkpointer.begin_step(1)
            assert f"tried again after {seconds} seconds" in warnings[-1]
            now += seconds - 1
            assert not checkpointer.is_due_again()
            now += 1
            assert checkpointer.is_due_again()
    checkpointer.save_steps(1)
    assert not checkpointer.is_due_again()
    assert checkpointer.steps() == [1]


def test_the_last_save_is_tried_again_until_it_is_there(open_checkpointer, warnings, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01, 0.01))
    checkpointer, save, calls = open_checkpointer(), ocp.AsyncCheckpointer.save, []

    def down(self, *args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down)
    checkpointer.begin_step(7)
    checkpointer.finish(7, lambda: checkpointer.begin_step(7))
    assert checkpointer.steps() == [7]
    assert len(warnings) == 2


def test_a_last_save_that_never_succeeds_is_to_be_run_again(open_checkpointer, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01))
    checkpointer = open_checkpointer()

    def down(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down)
    checkpointer.begin_step(8)
    with pytest.raises(Preempted, match="checkpoint 8, the last, could not be written"):
        checkpointer.finish(8, lambda: checkpointer.begin_step(8))


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_costs_one_checkpoint(open_checkpointer, warnings, monkeypatch, method):
    checkpointer = open_checkpointer(1)
    checkpointer.save_steps(1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._orbax, method, full)
        checkpointer.save_steps(2)
        assert "checkpoint 2 could not be written" in warnings[0]
        assert "No space left on device" in warnings[0]
        assert "training goes on" in warnings[0]
    assert 1 in checkpointer.steps()
    checkpointer.save_steps(3)
    assert checkpointer.steps() == [3]
    assert checkpointer.restored_step() == 3
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
