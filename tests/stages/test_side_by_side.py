"""Runs as processes of their own: which are made, how many at once, and what fails is told."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import Preempted, UserError
from jaxllm.stages import side_by_side
from jaxllm.stages.side_by_side import run_all


@dataclasses.dataclass(frozen=True)
class Program:
    """What stands in the place of a training."""

    code: str = ""
    rate: float = 0.1


FINISHES = "open('summary.json', 'w').write('{\"a\": 1}')"


def ends(text, code):
    return Program(f"print({text!r}, file=sys.stderr); sys.exit({code})")


@pytest.fixture
def started(monkeypatch):
    """The programs run rather than trainings; which began, and their processes, in order."""
    began = {}

    def start(name, config, folder, environment):
        run = RunDirectory(folder / name)
        run.open(dataclasses.asdict(config))
        run.begin(dataclasses.asdict(config))
        code = f"import os, sys, time\n{config.code}"
        with (folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stderr=log, cwd=run.path, env=os.environ | environment
            )
        began[name] = process
        return process

    monkeypatch.setattr(side_by_side, "_started", start)
    monkeypatch.setattr(side_by_side, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(side_by_side, "_gpus", list)
    return began


def test_what_is_done_is_not_made_again(started, tmp_path):
    configs = {name: Program(FINISHES) for name in "abc"}
    run_all(configs, tmp_path, 1)
    assert list(started) == ["a", "b", "c"]
    (tmp_path / "b" / "summary.json").unlink()
    started.clear()
    run_all(configs, tmp_path, 1)
    assert list(started) == ["b"]


def test_what_is_done_otherwise_is_told_before_anything_is_made(started, tmp_path):
    run_all({"b": Program(FINISHES)}, tmp_path, 1)
    started.clear()
    changed = {name: Program(FINISHES, rate=0.2) for name in "ab"}
    with pytest.raises(UserError, match=r"config\.rate: was 0\.1, now 0\.2"):
        run_all(changed, tmp_path, 1)
    assert not started


def test_two_at_once_meet(started, tmp_path):
    meet = "open('../{}.here', 'w')\nwhile not os.path.exists('../{}.here'): time.sleep(0.01)\n"
    configs = {
        "a": Program(meet.format("a", "b") + FINISHES),
        "b": Program(meet.format("b", "a") + FINISHES),
        "c": Program(FINISHES),
    }
    run_all(configs, tmp_path, 2)
    assert list(started) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("failing", "error", "told"),
    [
        (ends("Traceback ... ZeroDivisionError", 1), RuntimeError, "a ended with 1: .*a.log"),
        (ends("jaxllm: config.x: is wrong", 2), UserError, "a: config.x: is wrong"),
    ],
)
def test_where_a_run_fails_the_others_are_made(started, tmp_path, capsys, failing, error, told):
    with pytest.raises(error, match=told):
        run_all({"a": failing, "b": Program(FINISHES)}, tmp_path, 1)
    assert (tmp_path / "b" / "summary.json").exists()
    assert "a ended with 1" in capsys.readouterr().err or error is UserError


def test_where_a_run_was_stopped_no_other_begins(started, tmp_path):
    with pytest.raises(Preempted, match="a: stopped by SIGTERM"):
        run_all({"a": ends("jaxllm: stopped by SIGTERM", 75), "b": Program(FINISHES)}, tmp_path, 1)
    assert list(started) == ["a"]


def test_what_stops_this_process_stops_its_runs(started, tmp_path, monkeypatch):
    def stop(seconds):
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(side_by_side.time, "sleep", stop)
    with pytest.raises(Preempted):
        run_all({"a": Program("time.sleep(60)"), "b": Program(FINISHES)}, tmp_path, 1)
    assert started["a"].returncode not in (None, 0)
    assert list(started) == ["a"]


def test_runs_share_cores(started, tmp_path, monkeypatch):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("cores cannot be given here")
    given = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: given.append(cores))
    run_all({name: Program(f"time.sleep(0.2)\n{FINISHES}") for name in "ab"}, tmp_path, 2)
    assert given == [[0, 2], [1]]
    run_all({"c": Program(FINISHES)}, tmp_path, 1)
    assert len(given) == 2


def test_no_more_runs_than_gpus(started, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "_gpus", lambda: ["3"])
    seen = "assert os.environ['CUDA_VISIBLE_DEVICES'] == '3'\n"
    alone = "assert not os.path.exists('../running'); open('../running', 'w'); time.sleep(0.1)\n"
    leave = "\nos.remove('../running')"
    configs = {name: Program(seen + alone + FINISHES + leave) for name in "ab"}
    begin = time.monotonic()
    run_all(configs, tmp_path, 2)
    assert time.monotonic() - begin > 0.2


def test_gpus_that_are_hidden_are_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 2")
    assert side_by_side._gpus() == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert side_by_side._gpus() == []
