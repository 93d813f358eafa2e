"""Several processes that run one command: joining them, and what only one of them does.

Between them stands JAX's own coordination service: it tells who is alive, and passes small values.
Every process calls these functions in the same order. With a single process all of them are
trivial.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
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


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block before the others, who find what it has made."""
    if not is_main():
        from_main(lambda: None)
    yield
    if is_main():
        from_main(lambda: None)


def meet() -> None:
    """Returns when all processes have come here."""
    if several():
        _client().wait_at_barrier(f"jaxllm/meet/{next(_calls)}", 1000 * _A_MONTH)


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
        self._hosts: list[str] = []

    def join(self, group: ProcessGroup) -> None:
        """Joins the others, and begins to watch them; from here on only process 0 is heard.

        Raises:
            UserError: nothing around here tells who the others are.
            Preempted: not all of them came.
        """
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
            sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        _client().key_value_set(f"jaxllm/host/{global_state.process_id}", socket.gethostname())
        self._hosts = [_awaited(f"jaxllm/host/{n}") for n in range(global_state.num_processes)]
        threading.Thread(target=self._watch, name="watch over peers", daemon=True).start()

    def leave(self, code: int) -> NoReturn:
        """Ends this process with `code` once all have come as far."""
        self._end(code, "jaxllm/done", _A_MONTH)

    def fail(self, code: int) -> NoReturn:
        """Ends this process and all others with `code`."""
        with contextlib.suppress(Exception):
            _client().key_value_set(f"jaxllm/ended/{global_state.process_id}", str(code))
        self._end(code, "jaxllm/failed", _ENDING_SECONDS)

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
                    self._end(int(code), "jaxllm/failed", _ENDING_SECONDS)
            if lost := [self._name(index) for index in everyone if index not in alive]:
                say(
                    f"{', '.join(lost)} is gone: nothing was heard of it for {HEARTBEAT_SECONDS} "
                    "seconds; run the same command again, in every process"
                )
                self._exit(Preempted.exit_code)

    def _name(self, index: int) -> str:
        return f"process {index} on {self._hosts[index]}"

    def _end(self, code: int, barrier: str, seconds: int) -> NoReturn:
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


def _awaited(key: str) -> str:
    """The value of a key, however long it takes; one who is lost ends the wait by the watch."""
    return _client().blocking_key_value_get(key, 1000 * _A_MONTH)


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
