"""Goodput: which share of a run's wall time went into steps that count, and where the rest went.

A run may have several lives: its process is killed or preempted, and started again. Each life keeps
a `Ledger`, and `goodput.json` holds what all of them have spent:

    [{"began": 1764190000.0, "seconds": {"start": 8.1, "step": 95.2, ...},
      "first_step": 0, "last_step": 120, "finished": false}, ...]

`began` is Unix time. A life that was killed is known up to its last write, a few seconds before.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from jaxllm.files import write_json

CATEGORIES = (
    "start",
    "data",
    "restore",
    "compile",
    "step",
    "data_wait",
    "rollout",
    "evaluation",
    "checkpoint",
)
"""What a life spends its time on: until the run is set up, making data and tokenizer, reading a
checkpoint, the first step (which compiles), further steps, waiting for batches, evaluating, saving.
"""
LOST = "lost"
"""Of the seconds of steps, those of steps after the last checkpoint of a life that was cut off."""
DOWN = "down"
"""Between two lives."""

_WRITE_SECONDS = 2.0
# On a slow disk less often, so that writing stays below this share of the time.
_WRITE_SHARE = 0.005


@dataclasses.dataclass(frozen=True)
class Life:
    """What one life of the process has spent."""

    began: float
    """Unix time."""
    seconds: dict[str, float]
    """By category, every one of `CATEGORIES`; together the wall time of the life."""
    first_step: int | None = None
    """The step that it went on from; None where it did not come so far."""
    last_step: int | None = None
    """The last step that it finished."""
    finished: bool = False
    """Whether the run came to its end; what follows later is no time lost."""

    @property
    def wall_seconds(self) -> float:
        """How long it has lived."""
        return sum(self.seconds.values())


def lost_steps(lives: Sequence[Life]) -> list[int]:
    """Of each life the number of its steps that a later life, gone on from before them, had to make
    again."""
    lost = []
    kept = math.inf  # the earliest step that any later life went on from
    for life in reversed(lives):
        if life.first_step is None or life.last_step is None:
            lost.append(0)
            continue
        lost.append(int(max(0.0, life.last_step - max(life.first_step, kept))))
        kept = min(kept, life.first_step)
    return lost[::-1]


def seconds_by_category(lives: Sequence[Life]) -> dict[str, float]:
    """Seconds of all lives by `CATEGORIES`, `LOST` and `DOWN`, which add up to the run's wall time.

    `step` has no lost ones. The time between the end of a run and its going on for more steps is
    left out.
    """
    total = dict.fromkeys((*CATEGORIES, LOST, DOWN), 0.0)
    for life, lost in zip(lives, lost_steps(lives), strict=True):
        for category in CATEGORIES:
            total[category] += life.seconds[category]
        # The first step is not among the seconds of steps, so that one fewer shares them.
        timed = max(1, (life.last_step or 0) - (life.first_step or 0) - 1)
        lost_seconds = life.seconds["step"] * min(1.0, lost / timed)
        total["step"] -= lost_seconds
        total[LOST] += lost_seconds
    for life, following in itertools.pairwise(lives):
        if not life.finished:  # clocks of two machines may differ, and a clock may be set
            total[DOWN] += max(0.0, following.began - life.began - life.wall_seconds)
    return total


def goodput_scalars(lives: Sequence[Life]) -> dict[str, float]:
    """`goodput/useful_share`, `goodput/lives` and `goodput/seconds/CATEGORY` of all lives."""
    seconds = seconds_by_category(lives)
    wall = sum(seconds.values())
    scalars = {
        "goodput/useful_share": seconds["step"] / wall if wall else 0.0,
        "goodput/lives": float(len(lives)),
    }
    return scalars | {f"goodput/seconds/{name}": value for name, value in seconds.items()}


def read_lives(path: str | os.PathLike) -> list[Life]:
    """The lives in a `goodput.json`, oldest first; none, with a warning, where it is broken."""
    try:
        return [_parsed(entry) for entry in json.loads(Path(path).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logging.warning("%s: cannot be read (%s); goodput is counted anew", path, error)
        return []


class Ledger:
    """Where the time of this life goes: every moment to exactly one category.

    It goes to that of the innermost `spending` block, and outside all of them to the one last given
    to `otherwise`: `start`, until a caller says another. Not for several threads, but for reading
    `category`. Nothing here can end a run, and nothing of it takes more than a few microseconds but
    for writing.
    """

    def __init__(self, begin: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Counts from `begin`, a moment of `clock`."""
        self._clock = clock
        self._mark = begin
        self._began = time.time() - (clock() - begin)
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._open = ["start"]
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._earlier: list[Life] = []
        self._path: Path | None = None
        self._due = -math.inf
        self._warned = False

    def keep(self, path: str | os.PathLike) -> None:
        """From here on the life is kept in the file `path`, behind those that are there.

        To be called where the run's directory is known, on the process that writes its files.
        """
        self._path = Path(path)
        self._earlier = read_lives(path)
        self.write()

    @property
    def category(self) -> str:
        """What time is being spent on."""
        return self._open[-1]

    def spent(self, category: str) -> float:
        """Seconds of this life that went to a category."""
        self._settle()
        return self._seconds[category]

    @contextmanager
    def spending(self, category: str) -> Iterator[None]:
        """Time inside goes to `category`, but for that of blocks inside it."""
        self._settle()
        self._open.append(category)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def otherwise(self, category: str) -> None:
        """From here on time that is in no block goes to `category`."""
        self._settle()
        self._open[0] = category

    def resumed(self, step: int) -> None:
        """The life goes on from `step` (0: from the beginning); steps follow, the first of which
        compiles."""
        self._first_step = self._last_step = step
        self.otherwise("compile")
        self.write()

    def finished(self, step: int) -> None:
        """A step has finished."""
        self._last_step = step
        if self._open[0] == "compile":
            self.otherwise("step")

    def tick(self) -> None:
        """Writes the file if the last write is a few seconds ago; to be called often."""
        if self._clock() >= self._due:
            self.write()

    def write(self, *, finished: bool = False) -> None:
        """Writes the file: at checkpoints, and whenever the life may end.

        A full disk costs what was to be told, with a warning, given once.
        """
        if self._path is None:
            return
        begin = self._clock()
        try:
            write_json(self._path, [_entry(life) for life in self._lives(finished)])
        except OSError as error:
            if not self._warned:
                logging.warning("%s: goodput is being lost: %s", self._path, error.strerror)
            self._warned = True
        now = self._clock()
        self._due = now + max(_WRITE_SECONDS, (now - begin) / _WRITE_SHARE)

    def log_scalars(self) -> dict[str, float]:
        """Of all lives so far what is worth a curve."""
        scalars = goodput_scalars(self._lives())
        return {name: scalars[name] for name in ("goodput/useful_share", "goodput/seconds/lost")}

    def finish(self) -> dict[str, float]:
        """The run has come to its end: writes that, and returns all `goodput_scalars`."""
        self.write(finished=True)
        return goodput_scalars(self._lives())

    def _lives(self, finished: bool = False) -> list[Life]:
        self._settle()
        now = Life(self._began, dict(self._seconds), self._first_step, self._last_step, finished)
        return [*self._earlier, now]

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def _entry(life: Life) -> dict[str, Any]:
    entry = dataclasses.asdict(life)
    seconds = {category: round(value, 3) for category, value in life.seconds.items()}
    return entry | {"began": round(life.began, 3), "seconds": seconds}


def _parsed(entry: Any) -> Life:
    """A life as it was written; an entry that is none raises one of many errors."""
    seconds = {category: float(entry["seconds"].get(category, 0.0)) for category in CATEGORIES}
    if not all(0 <= value < math.inf for value in seconds.values()):
        raise ValueError("seconds must be finite and not negative")
    first, last = entry["first_step"], entry["last_step"]
    if not all(step is None or type(step) is int for step in (first, last)):
        raise ValueError("steps must be whole numbers")
    return Life(float(entry["began"]), seconds, first, last, bool(entry["finished"]))
