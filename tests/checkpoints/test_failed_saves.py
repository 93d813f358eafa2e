"""A full disk, and a store that does not answer: what is tried again, and when."""

import errno
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from jaxllm.checkpoints import checkpointer as checkpointer_module
from jaxllm.errors import Preempted


def _outage(monkeypatch, owner, name, times):
    """The first calls of a function fail, as if the store did not answer; the steps of the paths
    that it is called with."""
    function, asked = getattr(owner, name), []

    def unsteady(path, *args, **kwargs):
        asked.append(path.name)
        if len(asked) <= times:
            raise OSError(errno.EIO, "Input/output error")
        return function(path, *args, **kwargs)

    monkeypatch.setattr(owner, name, unsteady)
    return asked


def _down(*args, **kwargs):
    raise OSError(errno.EIO, "Input/output error")


class _Clock:
    """Moves by what is slept, and by 0.1 seconds whenever it is read."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        self.now += 0.1
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = _Clock()
    monkeypatch.setattr(checkpointer_module, "time", made)
    return made


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_WAITS", (0.0, 0.01, 0.01))


@pytest.fixture(params=["restore", "damage", "committed_steps"])
def saved_two(request, short_waits, open_checkpointer):
    """A checkpointer with two steps, what reads them, and that function's owner and name."""
    checkpointer = open_checkpointer()
    checkpointer.save_steps(1, 2)
    owner = checkpointer._orbax if request.param == "restore" else checkpointer_module
    return checkpointer, owner, request.param


def test_a_store_that_does_not_answer_is_asked_again(saved_two, warnings, monkeypatch):
    checkpointer, owner, where = saved_two
    asked = _outage(monkeypatch, owner, where, times=2)
    assert checkpointer.restored_step() == 2
    assert asked == ["checkpoints" if where == "committed_steps" else "2"] * 3
    assert len(warnings) == 2
    assert all("cannot be read now" in warning for warning in warnings)
    assert checkpointer.steps() == [1, 2]


def test_a_store_that_stays_away_makes_no_checkpoint_broken(saved_two, monkeypatch, tmp_path):
    checkpointer, owner, where = saved_two
    with monkeypatch.context() as patched:
        _outage(patched, owner, where, times=100)
        with pytest.raises(Preempted, match=r"cannot be read now .* run the same command again"):
            checkpointer.restored_step()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    assert checkpointer.restored_step() == 2


def test_a_store_that_does_not_answer_while_training_is_a_failed_save(
    open_checkpointer, warnings, monkeypatch
):
    checkpointer = open_checkpointer()
    with monkeypatch.context() as patched:
        _outage(patched, checkpointer_module, "committed_steps", times=100)
        checkpointer.begin_step(1)
    assert "checkpoint 1 could not be written" in warnings[0]
    checkpointer.begin_step(2)
    with monkeypatch.context() as patched:
        asked = _outage(patched, Path, "exists", times=100)
        checkpointer.poll()
        assert "2" in asked
    checkpointer.wait()  # nobody knew how it fared
    assert checkpointer.steps() == [2]
    assert len(warnings) == 1
    with monkeypatch.context() as patched:
        _outage(patched, checkpointer_module, "committed_steps", times=100)
        checkpointer.begin_step(4)
        checkpointer._drop_old()
    assert "an old checkpoint could not be removed" in warnings[-1]


def test_a_save_that_failed_is_due_again_after_longer_and_longer(
    open_checkpointer, warnings, monkeypatch, clock
):
    checkpointer = open_checkpointer()
    assert not checkpointer.retry_due
    with monkeypatch.context() as patched:
        patched.setattr(ocp.AsyncCheckpointer, "save", _down)
        for seconds in (5, 10, 20, 40, 80, 80):
            checkpointer.begin_step(1)
            assert f"tried again after {seconds} seconds" in warnings[-1]
            clock.now += seconds - 1
            assert not checkpointer.retry_due
            clock.now += 1
            assert checkpointer.retry_due
    checkpointer.begin_step(1)
    assert not checkpointer.retry_due  # it is under way
    checkpointer.wait()
    assert checkpointer.steps() == [1]


@pytest.mark.usefixtures("short_waits")
def test_the_last_save_is_tried_again_until_it_is_there(open_checkpointer, warnings, monkeypatch):
    checkpointer, save, calls = open_checkpointer(), ocp.AsyncCheckpointer.save, []

    def down(self, *args, **kwargs):
        calls.append(args)
        return (_down if len(calls) < 3 else save)(self, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down)
    checkpointer.begin_step(7)
    assert checkpointer.finish(7, lambda: checkpointer.begin_step(7))
    assert checkpointer.steps() == [7]
    assert len(warnings) == 2


@pytest.mark.parametrize(("stopping", "waits"), [(True, [5, 10]), (False, [5, 10, 20, 40, 80])])
@pytest.mark.parametrize("silent", [False, True])
def test_a_last_save_that_never_succeeds_is_told(
    open_checkpointer, monkeypatch, clock, stopping, waits, silent
):
    """Who is asked to stop has not the time for the longer waits, however long it has failed, and
    if the store does not even say which checkpoints there are."""
    checkpointer = open_checkpointer()
    with monkeypatch.context() as patched:
        patched.setattr(ocp.AsyncCheckpointer, "save", _down)
        if silent:
            _outage(patched, checkpointer_module, "committed_steps", times=100)
        for _ in range(4):
            checkpointer.begin_step(8)
        assert not checkpointer.finish(8, lambda: checkpointer.begin_step(8), stopping=stopping)
    assert clock.slept == waits


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
        assert "it is tried again after 5 seconds" in warnings[0]
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
    "notice", ["checkpointer.wait()", "while checkpointer._saving: checkpointer.poll()"]
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
