"""One life of a run: its processes from start to end, and never left behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

_WORK = re.compile(rb"^(read|train|tokenise|going on|step|evaluate)\b", re.MULTILINE)
"""How lines begin that tell of a run's work."""


class Topology(NamedTuple):
    """The processes of a life, and the mesh over their devices."""

    processes: int
    devices: int = 1
    """Of each process, simulated."""
    mesh: str = ""
    """`AXIS=SIZE` of an axis beside that of the data; empty: there is none."""

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices}" + (f" {self.mesh}" if self.mesh else "")


class End(NamedTuple):
    """How a life ended."""

    codes: tuple[int, ...]
    """Exit codes by process; negative: the signal that ended it."""
    seconds: float
    apart: float
    """Seconds from the end of the first process to that of the last."""
    alone: bool = False
    """Whether one was lost before all had joined, and the launcher had to end the others."""
    hung: bool = False
    """Whether it did not end in its time, and was killed."""

    @property
    def code(self) -> int:
        """The exit code of all together: 0 if all are 0, 75 if to be run again, else the worst."""
        codes = [75 if code < 0 or code > 128 else code for code in self.codes]
        return next((code for code in (1, 2, 75) if code in codes), max(codes))


class Command:
    """`jaxllm.main` with one configuration, over any number of processes on this machine."""

    def __init__(self, config: str, overrides: Sequence[str], compiled: Path) -> None:
        self._command = [sys.executable, "-m", "jaxllm.main", f"--config={config}", *overrides]
        self._environment = {
            # Every life compiles the same programs; all but the first find them here.
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "NPROC": "16",  # simulated devices share few cores: their rendezvous could time out
        }

    def start(self, run: Path, topology: Topology, output: Path) -> "Life":
        """Starts the processes of a life; what they print is added to the file `output`."""
        command = [*self._command, f"--workdir={run}"]
        command += [f"--config.mesh.{topology.mesh}"] if topology.mesh else []
        flags = f"--xla_force_host_platform_device_count={topology.devices}"
        commands = [command]
        if topology.processes > 1:
            group = [f"--coordinator=127.0.0.1:{_free_port()}", f"--processes={topology.processes}"]
            commands = [
                [*command, *group, f"--process={index}"] for index in range(topology.processes)
            ]
        return Life(commands, {**self._environment, "XLA_FLAGS": flags}, output)


class Life:
    """Processes that run together, each the leader of a session; a context that ends them."""

    def __init__(
        self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], output: Path
    ) -> None:
        self._output = output
        self._printed_before = output.stat().st_size if output.exists() else 0
        self._began = time.monotonic()
        self._first_end: float | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            with output.open("ab") as log:
                for command in commands:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            cwd=ROOT,
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def running(self) -> bool:
        """Whether a process has not ended yet."""
        running = [process.poll() is None for process in self._processes]
        if not all(running) and self._first_end is None:
            self._first_end = time.monotonic()
        return any(running)

    def overdue(self, whole: float, apart: float) -> bool:
        """Whether it has taken longer than `whole` seconds, or than `apart` since the end of its
        first process."""
        if self._first_end is not None and time.monotonic() - self._first_end > apart:
            return True
        return self.seconds > whole

    def end(self) -> End:
        """How it ended; what still runs is killed."""
        unfinished = self.running()
        alone = unfinished and self._first_end is not None and not self._joined()
        self.kill()
        now = time.monotonic()
        apart = now - (now if self._first_end is None else self._first_end)
        codes = tuple(process.returncode for process in self._processes)
        return End(codes, self.seconds, apart, alone, hung=unfinished and not alone)

    def _joined(self) -> bool:
        """Whether process 0 has begun to tell of its work, which it does when all have joined."""
        with self._output.open("rb") as file:
            file.seek(self._printed_before)
            return _WORK.search(file.read()) is not None

    def send(self, number: signal.Signals, index: int, reach: str) -> None:
        """Sends a signal to a process that still runs.

        Args:
            number: the signal.
            index: of the process.
            reach: `first` for the process that was started, `last` for the one that works (a
                process of several has a parent that waits for it), `all` for every one of them.
        """
        process = self._processes[index]
        if process.poll() is None:
            family = [process.pid, *_descendants(process.pid)]
            chosen = {"first": family[:1], "last": family[1:2] or family, "all": family}[reach]
            for pid in chosen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self) -> None:
        """Ends every process, and what it has started."""
        for process in self._processes:
            family = [process.pid, *_descendants(process.pid)] if process.poll() is None else []
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _descendants(pid: int) -> list[int]:
    """Children first, then theirs, where the system tells."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The name, in brackets, may hold anything; then come the state and the parent.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for ancestor in found:
        found += sorted(child for child, parent in parents.items() if parent == ancestor)
    return found[1:]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
