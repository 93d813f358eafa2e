"""Runs as processes of their own, several at a time, each with a share of the machine.

A run is made by the command that a user would give, `python -m jaxllm.main`, from a file of its
configuration, and writes into a log beside its directory.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import Preempted, UserError
from jaxllm.files import write_json

_POLL_SECONDS = 0.2


def run_all(configs: Mapping[str, Any], folder: Path, at_once: int) -> None:
    """Makes the runs that are not finished, so many at once; where one fails the others are made
    all the same.

    Args:
        configs: the configuration of each run, a dataclass, by the name of its directory.
        folder: where the directories are.
        at_once: how many run at a time; no more than there are GPUs, if there are any.

    Raises:
        UserError: a finished run is of another configuration (nothing has been made then), or one
            ended so, whose message is told.
        Preempted: a signal came here or to one of them; those under way have saved themselves.
        RuntimeError: one ended otherwise; its log has the traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [name for name, config in configs.items() if not _is_done(config, folder / name)]
    total, gpus = len(waiting), _gpus()
    slots = min(at_once, len(gpus)) if gpus else at_once
    running: dict[int, tuple[str, subprocess.Popen]] = {}
    failed: dict[str, int] = {}
    try:
        while running or (waiting and Preempted.exit_code not in failed.values()):
            for slot in range(slots):
                if waiting and slot not in running and Preempted.exit_code not in failed.values():
                    name = waiting.pop(0)
                    _tell(f"{folder / name}: run {total - len(waiting)} of {total}")
                    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot::slots])}
                    process = _started(name, configs[name], folder, environment if gpus else {})
                    _share_cores(process.pid, slot, slots)
                    running[slot] = name, process
            time.sleep(_POLL_SECONDS)
            for slot, (name, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode:
                        failed[name] = process.returncode
                        _tell(str(_error(process.returncode, folder, name)))
    finally:  # a signal to this process, too
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if failed:
        # What is to be run again says nothing of the others; a mistake is told before a crash.
        order = [Preempted.exit_code, UserError.exit_code]
        name = min(failed, key=lambda name: (*order, failed[name]).index(failed[name]))
        raise _error(failed[name], folder, name)


def _is_done(config: Any, path: Path) -> bool:
    """Whether a run is finished.

    Raises:
        UserError: it is, with another configuration.
    """
    if not RunDirectory(path).final_scores():
        return False
    RunDirectory(path).open(dataclasses.asdict(config), dataclasses.asdict(type(config)()))
    return True


def _started(
    name: str, config: Any, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    path = folder / f"{name}.json"
    write_json(path, {"config": dataclasses.asdict(config)})
    command = [sys.executable, "-m", "jaxllm.main", f"--config={path}"]
    with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"--workdir={folder / name}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )


def _share_cores(process: int, slot: int, slots: int) -> None:
    """Gives a process every so-many-th CPU core, where there are enough and that can be."""
    if slots > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[slot::slots]
        if cores:
            os.sched_setaffinity(process, cores)


def _gpus() -> Sequence[str]:
    """The GPUs that may be used, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    known = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(known.iterdir())] if known.is_dir() else []


def _error(code: int, folder: Path, name: str) -> UserError | Preempted | RuntimeError:
    """What a run that ended with `code` has told."""
    log = folder / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("jaxllm: ") if lines else ""
    if code == UserError.exit_code:
        return UserError(f"{name}: {last}")
    if code == Preempted.exit_code:
        return Preempted(f"{name}: {last}")
    return RuntimeError(f"{name} ended with {code}: {last} (see {log})")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
