"""What befalls one of several processes while they train ends all of them, and the run goes on."""

import os
import resource
import shutil
import signal
import sys
import time

import pytest


@pytest.mark.parametrize(
    ("count", "lost"),
    [(2, 1), *(pytest.param(*which, marks=pytest.mark.slow) for which in ((2, 0), (4, 2)))],
)
def test_a_killed_process_ends_the_others_and_half_of_them_go_on(
    arguments, settings, start, wait_for, alone, same_curve, tmp_path, count, lost
):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, settings), count)
    wait_for(workdir / "checkpoints" / "100", processes)
    os.kill(processes.worker(lost), signal.SIGKILL)
    begin = time.monotonic()
    assert processes.wait() == [137 if index == lost else 75 for index in range(count)]
    assert time.monotonic() - begin < 60
    for index in {*range(count)} - {lost}:
        told = processes.output(index)
        assert f"process {lost}" in told
        assert "gone" in told
    half = count // 2
    again = start(arguments("pretrain", workdir, settings), half)
    assert again.wait() == [0] * half
    assert "going on from step" in again.output(0)
    same_curve(alone, workdir)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    arguments, settings, start, wait_for, alone, scalars, same_curve, tmp_path
):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, settings), 2)
    wait_for(workdir / "checkpoints" / "100", processes)
    processes.running[1].terminate()
    assert processes.wait() == [75, 75], processes.output(0)
    (told,) = [line for line in processes.output(0).splitlines() if "stopped by" in line]
    assert "which is saved" in told
    step = int(told.split("after step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert max(step for step, _ in scalars(workdir)) == step
    assert start(arguments("pretrain", workdir, settings), 2).wait() == [0, 0]
    same_curve(alone, workdir)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_all_and_the_one_before_is_used(
    arguments, start, finished_run, same_curve, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    (workdir / "report.html").unlink()  # not finished
    damaged = next((workdir / "checkpoints" / "12" / "params").rglob("d/*"))
    damaged.write_bytes(b"x")
    processes = start(arguments("pretrain", workdir), 2)
    assert processes.wait() == [0, 0]
    assert "has 1 bytes" in processes.output(0)
    assert "going on from step 8 of 12" in processes.output(0)
    assert (workdir / "checkpoints" / "broken-12").is_dir()
    same_curve(workdir, finished_run)

    for path in (workdir / "checkpoints").glob("[0-9]*/params/manifest.ocdbt"):
        path.unlink()
    (workdir / "report.html").unlink()
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    processes = start(arguments("pretrain", workdir), 2)
    assert processes.wait() == [2, 2]
    assert "none of its checkpoints can be read" in processes.output(0)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


_FAULTY = """
import sys
from jaxllm.data import batches
from jaxllm.main import main

made = batches.BatchSource._make

def make(self, step):
    if "--process=1" in sys.argv and step == 120:
        raise RuntimeError("a fault of process 1 alone")
    return made(self, step)

batches.BatchSource._make = make
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_in_one_process_ends_all_though_there_are_checkpoints(
    arguments, settings, start, tmp_path
):
    workdir = tmp_path / "run"
    fields = settings | {"checkpoint.every": 50}
    processes = start(arguments("pretrain", workdir, fields), 2, program=("-c", _FAULTY))
    assert processes.wait(60) == [1, 1]
    assert (workdir / "checkpoints" / "100").is_dir()
    assert "RuntimeError: a fault of process 1 alone" in processes.output(1)
    assert "process 1 on" in processes.output(0)
    assert "ended with code 1" in processes.output(0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_is_full_for_one_process_ends_all_to_go_on(
    arguments, settings, start, wait_for, tmp_path, limited
):
    workdir = tmp_path / "run"
    # Larger than what the processes print, which their limit counts too.
    fields = settings | {"model.width": 128, "log.watchdog": 30}
    processes = start(arguments("pretrain", workdir, fields), 2)
    wait_for(workdir / "checkpoints" / "100", processes)
    worker = processes.worker(limited)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    assert processes.wait(60) == [75, 75]
    assert "could not be written" in processes.output(limited)
    assert "Traceback" not in processes.output(0) + processes.output(1)
    assert f"process {limited}" in processes.output(1 - limited)
    assert start(arguments("pretrain", workdir, fields), 2).wait() == [0, 0]
