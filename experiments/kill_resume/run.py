"""A run killed by SIGKILL and started again equals, bit for bit, one that was left alone.

    python experiments/kill_resume/run.py --workdir=runs/kill_resume

Trains one configuration twice: once to its end, and once killed at moments drawn from a seed,
one of them inside the write of a checkpoint, with the same command given again after each kill.
Then compares every line of `metrics.jsonl`, times aside, and every array of the last checkpoint
(parameters, optimizer state, counters), and exits with 1 if anything differs. Prints where each
kill landed. Options of `jaxllm.main` may follow, such as `--config.model.width=256`.

With the defaults: 60 steps of a small decoder on `builtin:pydocs`, three kills; about three
minutes on 2 CPU cores. Equality of bits is promised for CPUs of one kind with as many cores.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.tables import print_table

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = (
    "--config.steps=60",
    "--config.log.every=1",
    "--config.checkpoint.every=10",
    "--config.eval.every=20",
    "--config.eval.max_batches=4",
    "--config.batch_size=8",
    "--config.data.seq_len=128",
    "--config.model.width=192",
    "--config.references=False",
)
"""Small, with a log line for each step and several checkpoints and evaluations to be killed in."""

MEASURED = ("time", "train/tokens_per_second", "train/data_wait_share", "train/mfu")
"""What a metrics line says of the clock: the only things that two equal runs may differ in."""

ATTEMPTS = 5
"""Kills aimed at the write of a checkpoint before giving up on hitting one."""

Moment = Callable[[RunDirectory], bool]
"""Whether now is the moment to kill."""


class Kill(NamedTuple):
    """One kill, as it is shown."""

    aim: str
    landed: str


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "pretrain.py"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/kill_resume"))
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each life")
    options, overrides = parser.parse_known_args(arguments)
    for name in ("whole", "killed"):
        shutil.rmtree(options.workdir / name, ignore_errors=True)
    lives = _Lives(options.workdir, options.config, [*SETTINGS, *overrides], options.timeout)
    whole, killed = (
        RunDirectory(options.workdir / "whole"),
        RunDirectory(options.workdir / "killed"),
    )

    print("the run that is left alone ...", flush=True)
    lives.finish(whole)
    kills = []
    for aim, moment in _moments(whole, options.kills, random.Random(options.seed)):
        print(f"killing {aim} ...", flush=True)
        kills.append(Kill(aim, lives.kill(killed, moment)))
    print("the last life ...", flush=True)
    lives.finish(killed)

    print_table(
        ("kill", "aimed", "landed"),
        [(str(number), *kill) for number, kill in enumerate(kills, start=1)],
    )
    found = differences(whole, killed)
    for difference in found[:20]:
        print(difference)
    print("equal" if not found else f"{len(found)} difference(s)")
    return 1 if found else 0


def differences(one: RunDirectory, other: RunDirectory) -> list[str]:
    """What differs between two runs: lines of metrics, times aside, and the last checkpoint."""
    found = []
    lines = [[_unmeasured(line) for line in read_metrics(run.metrics)] for run in (one, other)]
    for number, (first, second) in enumerate(itertools.zip_longest(*lines), start=1):
        if json.dumps(first) != json.dumps(second):  # as text, so that NaN equals NaN
            found.append(f"metrics.jsonl:{number}: {first} against {second}")
    steps = [max(_committed(run), default=0) for run in (one, other)]
    if steps[0] != steps[1]:
        return [*found, f"last checkpoint: {steps[0]} against {steps[1]}"]
    for item in ("params", "progress"):
        arrays = [_arrays(run.checkpoints / str(steps[0]) / item) for run in (one, other)]
        for path in {**arrays[0], **arrays[1]}:
            first, second = (tree.get(path) for tree in arrays)
            if first is None or second is None or not _same_bits(first, second):
                found.append(f"checkpoint {steps[0]}: {item}{path} differs")
    return found


class _Lives:
    """Processes of `jaxllm.main` with one configuration."""

    def __init__(
        self, workdir: Path, config: str, overrides: Sequence[str], timeout: float
    ) -> None:
        self._command = [sys.executable, "-m", "jaxllm.main", f"--config={config}", *overrides]
        self._timeout = timeout
        self._log = workdir / "output.txt"
        workdir.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # Every life compiles the same programs; all but the first find them here.
            "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def finish(self, run: RunDirectory) -> None:
        """One life to its end, which must be good."""
        process = self._start(run)
        try:
            code = process.wait(self._timeout)
        finally:
            _kill(process)
        if code != 0:
            sys.exit(f"a run ended with exit code {code}; see {self._log}")

    def kill(self, run: RunDirectory, moment: Moment) -> str:
        """Lives until one could be killed at the moment; says where the kill landed."""
        for _ in range(ATTEMPTS):
            process = self._start(run)
            end = time.monotonic() + self._timeout
            try:
                while process.poll() is None and time.monotonic() < end and not moment(run):
                    time.sleep(0.0005)
            finally:
                _kill(process)
            if process.returncode != -signal.SIGKILL:
                sys.exit(f"a run ended before it could be killed; see {self._log}")
            if time.monotonic() >= end:
                sys.exit(f"the moment did not come in {self._timeout:g} s; see {self._log}")
            if moment(run):  # the write may have ended before the signal came
                return _landing(run)
        sys.exit(f"{ATTEMPTS} kills missed the write of a checkpoint")

    def _start(self, run: RunDirectory) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self._command, f"--workdir={run.path}"],
                env=self._environment,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )


def _moments(whole: RunDirectory, kills: int, draw: random.Random) -> list[tuple[str, Moment]]:
    """The moments to kill at, in order: the middle one in a write, the others at random."""
    config = whole.config()
    steps, every = config["steps"], config["checkpoint"]["every"]
    seconds_per_step = json.loads(whole.summary.read_text())["time/train"] / steps
    moments = []
    for number in range(kills):
        first, last = (1 + (steps - 1) * part // kills for part in (number, number + 1))
        if number == kills // 2:
            step = -(-first // every) * every
            moments.append((f"in a checkpoint's write, from step {step}", _writing(step)))
        else:
            step, delay = draw.randint(first, last - 1), draw.uniform(0, 2 * seconds_per_step)
            aim = f"{1000 * delay:.0f} ms after the log line of step {step}"
            moments.append((aim, _after(step, delay)))
    return moments


def _after(step: int, delay: float) -> Moment:
    def moment(run: RunDirectory) -> bool:
        if not any(line["step"] >= step for line in read_metrics(run.metrics)[-2:]):
            return False
        time.sleep(delay)
        return True

    return moment


def _writing(step: int) -> Moment:
    def moment(run: RunDirectory) -> bool:
        return any(unfinished >= step for unfinished in _unfinished(run))

    return moment


def _landing(run: RunDirectory) -> str:
    """Where a killed run stands, from what it left."""
    lines = read_metrics(run.metrics)
    checkpoint = max(_committed(run), default=None)
    unfinished = _unfinished(run)
    where = f"step {lines[-1]['step'] if lines else 0} logged, "
    where += "no checkpoint yet" if checkpoint is None else f"checkpoint {checkpoint} whole"
    return where + (f", {unfinished[0]} half written" if unfinished else "")


def _committed(run: RunDirectory) -> list[int]:
    return [int(name) for name in _names(run.checkpoints) if name.isdigit()]


def _unfinished(run: RunDirectory) -> list[int]:
    """The steps whose checkpoint has been begun and not been committed."""
    names = (name.partition(".orbax-checkpoint-tmp") for name in _names(run.checkpoints))
    return [int(step) for step, mark, _ in names if mark and step.isdigit()]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _unmeasured(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in MEASURED}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path.resolve())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
