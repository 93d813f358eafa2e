"""One run of the campaign: drawn, lived through its faults, and judged."""

import contextlib
import dataclasses
import itertools
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from comparing import differences
from faults import Fault, make_fault, small_disk
from lives import Command, End, Topology
from moments import Shape, standing
from outcomes import Fallen, Outcome

from jaxllm.checkpoints.run_directory import RunDirectory

TOLERANCE = 1e-3
"""Relative difference allowed to a run whose devices changed: they add in another order."""

LIVES = 8
"""Within so many a run must end."""
LIFE_SECONDS = 240.0
"""A life that takes longer hangs."""
APART_SECONDS = 60.0
"""Processes hang that do not end so soon after the first of them."""

_POLL_SECONDS = 0.001

OTHERS = {
    1: (Topology(2), Topology(1, 2), Topology(1, 2, "fsdp=2")),
    2: (Topology(1), Topology(4), Topology(2, 1, "fsdp=2"), Topology(2, 2, "tensor=2")),
    4: (Topology(2), Topology(4, 1, "fsdp=2"), Topology(2, 2, "fsdp=4")),
}
"""What a run over so many processes may go on with."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run, with everything drawn."""

    number: int
    name: str
    """Of its faults."""
    topology: Topology
    later: Topology
    """After the first fault."""
    faults: Sequence[Fault]


def draw_trial(
    number: int,
    name: str,
    processes: int,
    draw: random.Random,
    shape: Shape,
    most: int,
    changing: float,
) -> Trial:
    """A run with 1 to `most` faults of a kind, each in a part of the run of its own.

    `changing` is the share of runs that go on with other processes, devices or another mesh.
    """
    topology = later = Topology(processes)
    if draw.random() < changing:
        later = draw.choice(OTHERS[processes])
    count = draw.randint(1, most)
    parts = [1 + (shape.steps - 1) * part // count for part in range(count + 1)]
    faults: list[Fault] = []
    for first, last in itertools.pairwise(parts):
        over = later if faults else topology
        faults.append(make_fault(name, draw, shape, first, last, over.processes))
    return Trial(number, name, topology, later, faults)


def try_out(trial: Trial, command: Command, reference: RunDirectory, workdir: Path) -> Outcome:
    """Lives through a trial and judges it; what a run leaves stays only if it failed."""
    begin = time.monotonic()
    run = RunDirectory(workdir / f"run-{trial.number}")
    output = workdir / f"run-{trial.number}.txt"
    output.unlink(missing_ok=True)
    shutil.rmtree(run.path, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        if trial.name == "disk-full":
            stack.enter_context(small_disk(run.path))
        for fault in trial.faults:
            stack.callback(fault.stop)
        fallen, ends, problem = _live(trial, command, run, output)
        problems = [problem] if problem else _judge(trial, reference, run)
        outcome = Outcome(
            number=trial.number,
            fault=trial.name,
            topology=trial.topology,
            later=trial.later,
            fallen=fallen,
            ends=ends,
            missed=len(fallen) < len(trial.faults) and not problems,
            problems=problems,
            seconds=time.monotonic() - begin,
        )
        if not outcome.good and trial.name == "disk-full":
            shutil.copytree(run.path, workdir / f"failed-{trial.number}", dirs_exist_ok=True)
    if outcome.good:
        shutil.rmtree(run.path, ignore_errors=True)
        output.unlink()
    return outcome


def _live(
    trial: Trial, command: Command, run: RunDirectory, output: Path
) -> tuple[list[Fallen], list[End], str]:
    """Gives the command again and again until the run is done, with faults on the way.

    Returns:
        The faults that came, how each life ended, and why the run is not done, if it is not.
    """
    fallen: list[Fallen] = []
    ends: list[End] = []
    while len(ends) < LIVES:
        over = trial.later if fallen else trial.topology
        fault = trial.faults[len(fallen)] if len(fallen) < len(trial.faults) else None
        with output.open("a") as file:
            file.write(f"=== life {len(ends) + 1}: {over}\n")
        end, struck = _live_once(command, over, fault, run, output)
        ends.append(end)
        if fault and struck and not (fault.needs_next_life and end.code == 0):
            after = "" if end.hung else fault.after(run)
            fallen.append(struck._replace(done=", ".join(filter(None, (struck.done, after)))))
        if end.hung:
            return fallen, ends, f"a life hung and was killed: {end.codes}"
        if end.code == 0:
            return fallen, ends, ""
        if end.code != 75:
            return fallen, ends, f"a life ended with {end.codes}"
    return fallen, ends, f"not done after {LIVES} lives"


def _live_once(
    command: Command, over: Topology, fault: Fault | None, run: RunDirectory, output: Path
) -> tuple[End, Fallen | None]:
    """One life, and what befell it."""
    struck = None
    with command.start(run.path, over, output) as life:
        while life.running():
            if life.overdue(LIFE_SECONDS, APART_SECONDS):
                break
            if fault and struck is None and fault.moment.come(run, life.seconds) and life.running():
                done = fault.strike(life, run)
                struck = Fallen(fault.moment.aim, done, standing(run))
            time.sleep(_POLL_SECONDS)
        return life.end(), struck


def _judge(trial: Trial, reference: RunDirectory, run: RunDirectory) -> list[str]:
    """What is wrong with a run that has come to its end."""
    tolerance = 0.0 if trial.later == trial.topology else TOLERANCE
    return differences(reference, run, tolerance)
