"""Several processes that run one command: joining them, and what only one of them does.

Between them stands JAX's own coordination service: it tells who is alive, and passes small values.
Every process calls these functions in the same order. With a single process all of them are
trivial.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

# The client of the coordination service has no public name; Orbax takes it from here too.
from jax._src.distributed import global_state

from jaxllm.errors import Preempted, UserError
from jaxllm.supervisor import ProcessGroup, Supervisor

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is gone."""
_LOOK_SECONDS = 1.0
"""How often a process looks whether the others are well."""
_ENDING_SECONDS = 10
"""How long a process that ends with an error waits until the others have heard of it."""
_LINGER_SECONDS = 1.0
"""How much longer process 0 stays, with whose end the coordination service ends."""
_A_MONTH = 30 * 24 * 3600
_FAILED = "jaxllm/failed"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")

_calls = itertools.count()


def several() -> bool:
    """Whether there are other processes."""
    return global_state.num_processes > 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and messages."""
    return global_state.process_id == 0


def from_main(compute: Callable[[], T]) -> T:
    """What `compute` gives in process 0, in all of them; it is only called there.

    It must be something that JSON can hold.
    """
    if not several():
        return compute()
    key = f"jaxllm/value/{next(_calls)}"
    if not is_main():
        return json.loads(_awaited(key))
    value = compute()
    _client().key_value_set(key, json.dumps(value))
    return value


def gathered(value: T, seconds: float = _A_MONTH) -> list[T]:
    """What each process gives, by its number, in all of them; it must be what JSON can hold.

    Raises:
        TimeoutError: one has not come here in time.
    """
    if not several():
        return [value]
    key = f"jaxllm/gathered/{next(_calls)}"
    _client().key_value_set(f"{key}/{global_state.process_id}", json.dumps(value))
    until = time.monotonic() + seconds
    numbers = range(global_state.num_processes)
    return [json.loads(_awaited(f"{key}/{number}", until)) for number in numbers]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block before the others, who find what it has made."""
    key = f"jaxllm/first/{next(_calls)}"
    if not is_main():
        _awaited(key)
    yield
    if is_main() and several():
        _client().key_value_set(key, "")


def check_shared(folder: Path, name: str) -> None:
    """Checks that all processes see the same folder `name`, and can write into it.

    Raises:
        UserError: one does not.
    """
    if not several():
        return
    token = from_main(lambda: uuid.uuid4().hex)
    mark = folder / f".{token}"
    with main_first():
        if is_main():
            mark.touch()
    own = folder / f".{token}-{global_state.process_id}"
    try:
        own.touch()
        own.unlink()
        seen = mark.exists()
    except OSError:
        seen = False
    all_seen = gathered(seen)
    if is_main():
        mark.unlink(missing_ok=True)
    if not all(all_seen):
        raise UserError(
            f"{name}={folder}: must be on a file system that all processes see and can write; "
            f"process {all_seen.index(False)} does not see the folder of process 0."
        )


def say(text: str) -> None:
    """Tells of a fault, in whichever process it is."""
    which = f" (process {global_state.process_id})" if several() else ""
    stream = sys.stderr if is_main() else sys.__stderr__
    print(f"jaxllm{which}: {text}", file=stream, flush=True)


def warn(message: str) -> None:
    """Prints a warning where it does not mix with results, in whichever process it is."""
    say(f"warning: {message}")


class Membership:
    """This process as one of several: it watches the others, and all end alike."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._ending = threading.Lock()
        self.joined = False
        """Whether it has found the others, so that it may not end without them."""

    def join(self, group: ProcessGroup) -> None:
        """Joins the others, and begins to watch them; from here on only process 0 is heard.

        Raises:
            UserError: nothing around here tells who the others are.
            Preempted: not all of them came.
        """
        if group.index == 0 and group.coordinator is not None:
            _check_free(group.coordinator)
        self._supervisor.joining()
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:  # what waits outside of Python heeds no handler of ours
            signal.signal(number, signal.SIG_DFL)
        # When a process is lost, JAX would abort the others; as "recoverable" ones they live to
        # say which it was. And the stop that a signal asks for is `jaxllm.preemption`'s.
        jax.config.update("jax_enable_recoverability", True)
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                group.coordinator,
                group.count,
                group.index,
                cluster_detection_method="deactivate" if group.coordinator else None,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
            self.joined = True
            for number, handler in handlers.items():
                signal.signal(number, handler)
        except ValueError as error:
            raise UserError(
                f"--processes=auto: JAX finds no cluster here ({_line(error)}); give "
                "--coordinator=HOST:PORT --processes=N --process=I."
            ) from None
        except RuntimeError as error:
            raise Preempted(
                f"the processes did not find together ({_line(error)}); see whether all of them "
                "run, with the same --coordinator and --processes, and run the command again"
            ) from None
        self._supervisor.coordinated_at(global_state.coordinator_address or "")
        if not is_main():
            nowhere = Path(os.devnull).open("w", encoding="utf-8", errors="replace")  # noqa: SIM115
            sys.stdout = sys.stderr = nowhere
        _client().key_value_set(f"jaxllm/host/{global_state.process_id}", socket.gethostname())
        threading.Thread(target=self._watch, name="watch over peers", daemon=True).start()

    def leave(self, code: int) -> NoReturn:
        """Ends this process with `code` once all have come as far."""
        _ignore_signals()
        self._end(code, "jaxllm/done", _A_MONTH)

    def fail(self, code: int) -> NoReturn:
        """Ends this process and all others with `code`."""
        _ignore_signals()
        with contextlib.suppress(Exception):
            _client().key_value_set(f"jaxllm/ended/{global_state.process_id}", str(code))
        self._end(code, _FAILED, _ENDING_SECONDS)

    def find_lost(self) -> None:
        """Returns if no process is found lost in the time that this takes; if one is, this process
        is ended. To be called when something has failed that others take part in."""
        time.sleep(HEARTBEAT_SECONDS + _ENDING_SECONDS)

    def _watch(self) -> None:
        everyone = list(range(global_state.num_processes))
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                alive = _client().get_live_nodes(everyone)  # waits until all of these have asked
                ended = _client().key_value_dir_get("jaxllm/ended/")
            except Exception as error:  # JAX is about to abort this process
                say(f"{self._name(0)} does not answer ({_line(error)})")
                self._exit(Preempted.exit_code)
            for key, code in ended:
                index = int(key.rsplit("/", 1)[1])
                if index != global_state.process_id:
                    say(f"{self._name(index)} ended with code {code}")
                    self._end(int(code), _FAILED, _ENDING_SECONDS)
            if lost := [self._name(index) for index in everyone if index not in alive]:
                say(
                    f"{', '.join(lost)} is gone: nothing was heard of it for {HEARTBEAT_SECONDS} "
                    "seconds; run the same command again, in every process"
                )
                self._exit(Preempted.exit_code)

    def _name(self, index: int) -> str:
        hosts = {}
        with contextlib.suppress(Exception):  # it has not come as far, or process 0 is gone
            hosts = dict(_client().key_value_dir_get("jaxllm/host/"))
        host = hosts.get(f"jaxllm/host/{index}")
        return f"process {index} on {host}" if host else f"process {index}"

    def _end(self, code: int, barrier: str, seconds: int) -> NoReturn:
        if barrier == _FAILED and not self._ending.acquire(blocking=False):
            time.sleep(_A_MONTH)  # the other thread ends this process
        with contextlib.suppress(Exception):
            _client().wait_at_barrier(barrier, 1000 * seconds)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        self._supervisor.ended(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if is_main():
            time.sleep(_LINGER_SECONDS)
        # Not by way of Python: threads may be waiting for processes that are gone.
        os._exit(code)


def _client() -> Any:
    return global_state.client


def _awaited(key: str, until: float = math.inf) -> str:
    """The value of a key, however long it takes; one who is lost ends the wait by the watch.

    Raises:
        TimeoutError: it is not there at `until`, of `time.monotonic`.
    """
    while True:
        try:  # in short waits, between which Python heeds signals
            return _client().blocking_key_value_get(key, round(1000 * _LOOK_SECONDS))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() >= until:
                raise TimeoutError from None


def _check_free(address: str) -> None:
    """Checks that process 0 can listen at its own address.

    Raises:
        UserError: somebody else does.
    """
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator={address}: process 0 cannot listen there ({error.strerror}); "
                "choose another port."
            ) from None


def _ignore_signals() -> None:
    """From here on the process ends anyway, with a code that is decided."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
