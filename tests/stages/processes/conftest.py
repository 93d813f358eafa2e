"""Processes that run one command together on loopback, and what their runs are held against."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest


class Processes:
    """Processes that run one command together; `timeout` seconds at most, and killed then."""

    def __init__(self, commands, folder, devices):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "NPROC": "16",
        }
        self._files = [
            [(folder / f"process_{number}.{stream}").open("w+b") for stream in ("err", "out")]
            for number in range(len(commands))
        ]
        self.running = [
            subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environment)
            for command, (err, out) in zip(commands, self._files, strict=True)
        ]

    def wait(self, seconds=150):
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.running]
        finally:
            self.kill()

    def kill(self):
        for process in self.running:
            if process.poll() is None:
                process.kill()  # its child ends with it
                process.wait()

    def worker(self, index):
        """The process id of the one that works, the child of the one that was started."""
        pid = self.running[index].pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return int(file.read().split()[0])

    def output(self, index):
        return "".join(self.streams(index))

    def streams(self, index):
        """What was written to standard error, and to standard output."""
        for file in self._files[index]:
            file.seek(0)
        return [file.read().decode() for file in self._files[index]]


@pytest.fixture
def start(tmp_path):
    """Starts the same command in several processes; a single one is started plainly."""
    started = []

    def begin(arguments, count, devices=1, program=("-m", "jaxllm.main")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        group = [f"--coordinator={address}", f"--processes={count}"]
        commands = [
            [*program, *arguments, *(group if count > 1 else [])]
            + ([f"--process={index}"] if count > 1 else [])
            for index in range(count)
        ]
        started.append(Processes(commands, tmp_path, devices))
        return started[-1]

    yield begin
    for processes in started:
        processes.kill()


@pytest.fixture
def wait_for():
    """Waits until running processes have written a path; fails if one of them ends before."""

    def wait(path, processes, seconds=100):
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, processes.output(0)
            assert all(process.poll() is None for process in processes.running), processes.output(0)
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def scalars():
    """Reads every scalar of training and evaluation, by step and name."""

    def read(workdir):
        names = ("train/loss", "train/grad_norm", "eval/loss")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        # A run that went on has no step twice, and misses none.
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        return {
            (line["step"], name): line[name] for line in lines for name in names if name in line
        }

    return read


@pytest.fixture(scope="session")
def same_curve(scalars):
    """Checks that two runs have logged the same scalars, up to rounding."""

    def check(one, other):
        one, other = scalars(one), scalars(other)
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), [other[key] for key in one], rtol=1e-4)

    return check


@pytest.fixture(scope="session")
def settings():
    """Fields of a run with enough steps to be killed among them."""
    return {"steps": 500, "checkpoint.every": 100, "eval.every": 250}


@pytest.fixture(scope="session")
def alone(arguments, compiled, settings, tmp_path_factory):
    """What one process with one device makes of these settings; tests only read it."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jaxllm.main", *arguments("pretrain", workdir, settings)]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=150)
    return workdir
