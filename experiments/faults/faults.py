"""The faults: what each does to a run, at its moment and once the life has ended."""

import contextlib
import dataclasses
import errno
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from lives import Life
from moments import Moment, Shape, committed, draw_moment, with_checkpoints

from jaxllm.checkpoints.run_directory import RunDirectory

DISK_MIB = 64
"""Size of the file system of a run whose disk is to be full."""


class Fault(Protocol):
    """One fault of one life."""

    moment: Moment

    @property
    def needs_next_life(self) -> bool:
        """Whether it is no fault for a run that has been done with its life."""

    def strike(self, life: Life, run: RunDirectory) -> str:
        """Does it, now; says what was done."""

    def after(self, run: RunDirectory) -> str:
        """What is left to do once the life has ended; says what was done, or nothing."""

    def stop(self) -> None:
        """Takes back what goes on by itself."""


@dataclasses.dataclass
class Signalled:
    """A signal to one process or to all."""

    moment: Moment
    number: signal.Signals
    to: int | None
    """The process; None: all."""
    reach: str
    """As of `Life.send`."""

    @property
    def needs_next_life(self) -> bool:
        """Who is killed is not done; who is asked to stop after the last step may be."""
        return self.number == signal.SIGKILL

    def strike(self, life: Life, run: RunDirectory) -> str:
        for index in range(len(life)) if self.to is None else (self.to,):
            life.send(self.number, index, self.reach)
        one = f"process {self.to}" + {"last": " (its child)", "all": " and its child"}.get(
            self.reach, ""
        )
        return f"{self.number.name} to {'all' if self.to is None else one}"

    def after(self, run: RunDirectory) -> str:
        return ""

    def stop(self) -> None:
        pass


@dataclasses.dataclass
class Damaged(Signalled):
    """A signal that ends the life, and then a file of the newest checkpoint is damaged."""

    how: str
    draw: random.Random

    @property
    def needs_next_life(self) -> bool:
        """There is nobody else to find the damage."""
        return True

    def after(self, run: RunDirectory) -> str:
        newest = run.checkpoints / str(committed(run)[-1])
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        if self.how != "deleted":
            files = [path for path in files if path.stat().st_size]
        path = self.draw.choice(files)
        return f"{path.relative_to(run.checkpoints)} {_damage(path, self.how, self.draw)}"


@dataclasses.dataclass
class FullDisk:
    """No room where the run is, for a time; then perhaps a signal while it lasts."""

    moment: Moment
    seconds: float
    signalled: Signalled | None
    timer: threading.Timer | None = None
    """What ends it, once begun."""

    needs_next_life = False

    def strike(self, life: Life, run: RunDirectory) -> str:
        filler = run.path / ".filler"
        self.timer = threading.Timer(self.seconds, filler.unlink, kwargs={"missing_ok": True})
        self.timer.daemon = True
        _fill(filler)
        self.timer.start()
        done = f"no room for {self.seconds:.1f} s"
        return f"{done}, and {self.signalled.strike(life, run)}" if self.signalled else done

    def after(self, run: RunDirectory) -> str:
        return ""

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


NAMES = ("kill-one", "kill", "term-one", "term", "disk-full", "truncated", "deleted", "flipped")
"""Of the faults: SIGKILL and SIGTERM, to one process or all; no room on the disk; and a file of the
newest checkpoint truncated, deleted, or with bytes of it flipped."""


def make_fault(
    name: str, draw: random.Random, shape: Shape, first: int, last: int, processes: int
) -> Fault:
    """A fault with everything drawn, that comes between two steps (or in a start or an end)."""
    number = draw.choice((signal.SIGKILL, signal.SIGTERM))
    if name.startswith("kill"):
        number = signal.SIGKILL
    elif name.startswith("term"):
        number = signal.SIGTERM
    to = draw.randrange(processes) if name.endswith("-one") else None
    # A cluster signals what was started, or all that it became; memory runs out for what works.
    reach = draw.choice(("first", "last") if number == signal.SIGKILL else ("first", "all"))
    if name == "disk-full":
        moment = draw_moment(draw, shape, first, last, "step write end")
        signalled = Signalled(moment, number, None, reach) if draw.random() < 0.3 else None
        return FullDisk(moment, draw.uniform(0.3, 8.0), signalled)
    if name in ("truncated", "deleted", "flipped"):
        # There must be one to fall back on.
        first = min(max(first, 2 * shape.every), last)
        moment = with_checkpoints(2, draw_moment(draw, shape, first, last, "step write"))
        return Damaged(moment, number, None, reach, name, draw)
    return Signalled(draw_moment(draw, shape, first, last), number, to, reach)


def can_mount() -> bool:
    """Whether a file system can be mounted here."""
    try:
        with small_disk(Path("/tmp") / f"faults-{random.SystemRandom().getrandbits(64):x}"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Inside, the folder is a file system of `DISK_MIB` in memory; then it is gone.

    Raises:
        subprocess.CalledProcessError: it cannot be mounted.
        OSError: there is no command to mount it with, or the folder cannot be made.
    """
    folder.mkdir(parents=True)
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield
        finally:
            # Lazily: a process that was killed may not be gone from it yet.
            subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
    finally:
        folder.rmdir()


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        for piece in (bytes(2**20), bytes(2**12)):
            try:
                while True:
                    file.write(piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _damage(path: Path, how: str, draw: random.Random) -> str:
    """Damages a file; says how."""
    if how == "deleted":
        path.unlink()
        return "deleted"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        size = draw.randrange(len(content))
        path.write_bytes(content[:size])
        return f"cut from {len(content)} to {size} bytes"
    places = draw.sample(range(len(content)), min(len(content), draw.randint(1, 4)))
    for place in places:
        content[place] ^= draw.randint(1, 255)
    path.write_bytes(content)
    return f"of {len(content)} bytes, flipped at {', '.join(map(str, sorted(places)))}"
