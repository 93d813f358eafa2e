"""The group of processes that a command belongs to, and the parent that waits for a process of it.

A process of several may be ended by JAX itself, from a thread of its own and without a chance to
say why: when the process that coordinates them all is gone, say. So it is the child of one that
does nothing but wait, knows no JAX, and turns whatever ended the child into a message and an exit
code.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from jaxllm.errors import Preempted, UserError

FLAGS = ("coordinator", "processes", "process")
_SIGNALLED = 128
"""With the number of the signal, as shells tell what a signal has ended."""


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes that run a command together, and which of them this one is.

    What is None is found out by JAX from its surroundings.
    """

    coordinator: str | None = None
    """`HOST:PORT` of process 0, which the others can reach."""
    count: int | None = None
    index: int | None = None


def process_group(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[ProcessGroup | None, list[str]]:
    """The group that a command line or its surroundings tell of, and the other arguments.

    `--coordinator=HOST:PORT --processes=N --process=I`, or `--processes=auto`, which leaves it to
    JAX. Without a flag, a SLURM step of several tasks and a TPU slice of several hosts under
    Kubernetes are groups too.

    Returns:
        None for a single process; and the arguments that are not of the group.

    Raises:
        UserError: a flag is missing, or its value is wrong.
    """
    given, rest = _flags(arguments)
    if not given:
        return (ProcessGroup() if _in_cluster(environment) else None), rest
    if given == {"processes": "auto"}:
        return ProcessGroup(), rest
    if missing := [f"--{name}" for name in FLAGS if name not in given]:
        raise UserError(
            f"{', '.join(missing)} is missing: give --coordinator=HOST:PORT --processes=N "
            "--process=I, or --processes=auto."
        )
    count, index = (_number(name, given[name]) for name in ("processes", "process"))
    if not 0 <= index < count:
        raise UserError(f"--process={index}: must be at least 0 and below --processes={count}.")
    if not re.fullmatch(r".+:\d{1,5}", given["coordinator"]):
        raise UserError(f"--coordinator={given['coordinator']}: must be HOST:PORT of process 0.")
    if count == 1:
        return None, rest
    return ProcessGroup(given["coordinator"], count, index), rest


class Supervisor:
    """The child's way to tell its parent what it will have to know once the child is gone."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def joining(self) -> None:
        """Tells that it waits for the other processes, in a call that JAX may abort."""
        self._note("joining", "")

    def coordinated_at(self, address: str) -> None:
        """Tells where the coordinating process is."""
        self._note("coordinator", address)

    def ended(self, code: int) -> None:
        """Tells that all is done, with this exit code, whatever happens while the child ends."""
        self._note("code", str(code))

    def _note(self, name: str, value: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._pipe, f"{name} {value}\n".encode())


def supervise() -> Supervisor | int:
    """Goes on in a child process, and waits for it in this one.

    Both return: the child with the way to its parent, and the parent, once the child has ended,
    with the exit code. What the parent is asked for by SIGTERM or SIGINT it passes on; a child
    does not outlive its parent.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    # They wait to be asked for: a handler could run too late, when waiting has begun already.
    awaited = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if not child:
        os.close(reading)
        os.setpgid(0, 0)  # Ctrl-C reaches it once: through its parent
        _die_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return Supervisor(writing)
    os.close(writing)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # or macOS drops it
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if (number := signal.sigwait(awaited)) != signal.SIGCHLD:
            os.kill(child, number)  # it is there until `waitpid` has told of its end
    os.set_blocking(reading, False)  # a grandchild may hold the other end
    try:
        told = os.read(reading, 4096).decode()
    except BlockingIOError:
        told = ""
    notes = dict(line.split(" ", 1) for line in told.splitlines())
    return _exit_code(status, notes)


def _exit_code(status: int, notes: Mapping[str, str]) -> int:
    """The exit code of a child that ended with `status`; says what there is to say."""
    if "code" in notes:
        return int(notes["code"])
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    address = notes.get("coordinator", "")
    name = signal.Signals(number).name
    if "joining" in notes and not address and number != signal.SIGKILL:
        _tell(
            f"the processes did not find together, and {name} ended this one; see whether all of "
            "them run, with the same --coordinator and --processes, and run the command again"
        )
        return Preempted.exit_code
    if number == signal.SIGABRT and address:
        _tell(
            f"process 0, which coordinated the others at {address}, "
            f"{'does not answer' if _answers(address) else 'is gone'}, and JAX aborted this one; "
            "run the same command again, in every process"
        )
        return Preempted.exit_code
    _tell(f"ended by {name}")
    return _SIGNALLED + number


def _tell(text: str) -> None:
    print(f"jaxllm: {text}", file=sys.stderr)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _die_with(parent: int) -> None:
    """Lets Linux end this process when its parent ends; elsewhere nothing can."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)


def _flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    given, rest = {}, []
    for argument in arguments:
        match = re.fullmatch(r"--?(\w+)=(.*)", argument)
        if match and match[1] in FLAGS:
            given[match[1]] = match[2]
        else:
            rest.append(argument)
    return given, rest


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that a cluster has started."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    in_step = "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1
    return in_step or (slices.isdigit() and int(slices) > 1) or "," in hosts


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"--{name}={value}: must be a number.")
    return int(value)
