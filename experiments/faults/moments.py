"""When a fault comes: moments told from the clock and from what a run has written so far."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics


class Shape(NamedTuple):
    """What moments of a run are drawn from: its numbers, and times of one that was left alone."""

    steps: int
    every: int
    """Steps between checkpoints."""
    start: float
    """Seconds from the start to the first step."""
    step: float
    """Seconds of a step, checkpoints and evaluations among them."""
    end: float
    """Seconds from the last step to the end."""


class Moment(NamedTuple):
    """A moment in a life."""

    aim: str
    come: Callable[[RunDirectory, float], bool]
    """Whether it has come, given the run and the seconds since the life began; it may wait for a
    part of a second to say so."""


def draw_moment(
    draw: random.Random, shape: Shape, first: int, last: int, kinds: str = "start step write end"
) -> Moment:
    """A moment between two steps, or in the start of a life, or, after the last step, in its end.

    Args:
        draw: where the draws come from.
        shape: of the run.
        first, last: the steps that it is to lie between.
        kinds: what may be drawn, of `start`, `step` (some time after its log line), `write` (a
            checkpoint is half written) and `end`.
    """
    named = [kind for kind in kinds.split() if kind != "end" or last == shape.steps]
    kind = draw.choices(named, [{"step": 2, "write": 2}.get(kind, 1) for kind in named])[0]
    if kind == "start":
        seconds = draw.uniform(0, shape.start)
        return Moment(f"{seconds:.1f} s into a life", lambda run, elapsed: elapsed >= seconds)
    if kind == "write":
        step = min(-(-draw.randint(first, last) // shape.every) * shape.every, shape.steps)
        return Moment(f"in the write of checkpoint {step} or later", _writing(step))
    if kind == "end":
        return _after(shape.steps, draw.uniform(0, 0.8 * shape.end))
    return _after(draw.randint(first, last), draw.uniform(0, 2 * shape.step))


def with_checkpoints(count: int, moment: Moment) -> Moment:
    """The first such moment at which so many checkpoints are whole."""
    return Moment(
        moment.aim,
        lambda run, elapsed: len(committed(run)) >= count and moment.come(run, elapsed),
    )


def standing(run: RunDirectory) -> str:
    """Where a run stands, from what it has written."""
    lines = read_metrics(run.metrics)
    whole = committed(run)
    where = f"step {lines[-1]['step'] if lines else 0} logged, "
    where += f"checkpoint {whole[-1]} whole" if whole else "no checkpoint yet"
    unfinished = _unfinished(run)
    return where + (f", {unfinished[0]} half written" if unfinished else "")


def committed(run: RunDirectory) -> list[int]:
    """The steps whose checkpoint is whole, oldest first."""
    return sorted(int(name) for name in _names(run.checkpoints) if name.isdigit())


def _after(step: int, delay: float) -> Moment:
    def come(run: RunDirectory, elapsed: float) -> bool:
        if not any(line["step"] >= step for line in read_metrics(run.metrics)[-2:]):
            return False
        time.sleep(delay)
        return True

    return Moment(f"{1000 * delay:.0f} ms after the log line of step {step}", come)


def _writing(step: int) -> Callable[[RunDirectory, float], bool]:
    return lambda run, elapsed: any(unfinished >= step for unfinished in _unfinished(run))


def _unfinished(run: RunDirectory) -> list[int]:
    """The steps whose checkpoint has been begun and not been committed."""
    names = (name.partition(".orbax-checkpoint-tmp") for name in _names(run.checkpoints))
    return [int(step) for step, mark, _ in names if mark and step.isdigit()]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
