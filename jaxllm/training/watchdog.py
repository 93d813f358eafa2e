"""A watchdog: when no step finishes for long, it tells what is waited for, and where."""

import contextlib
import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax

_WAITED_FOR = {
    "restore": "a checkpoint to be read",
    "compile": "the first step on the devices, which compiles",
    "step": "a step on the devices",
    "data_wait": "the next batch",
    "evaluation": "an evaluation",
    "checkpoint": "a checkpoint to be saved",
}


def waited_for(category: str) -> str:
    """What a run that spends its time on `category` (of a `Ledger`) is waiting for."""
    return _WAITED_FOR.get(category, category)


class Watchdog:
    """Inside its `with` block: when nothing has finished for `seconds`, it writes to standard error
    what is waited for and the stack traces of all threads; and again after each further such time.

    It changes nothing else: whether to wait on is up to people, or to the scheduler. What has
    stopped without letting go of Python's global lock stops the watchdog too.
    """

    def __init__(self, seconds: float, describe: Callable[[], str]) -> None:
        """Watches with this patience, 0: not at all; `describe` tells what is waited for."""
        self._seconds = seconds
        self._describe = describe
        self._who = f"process {jax.process_index()} on {socket.gethostname()}"
        self._step = 0
        self._moment = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._moment = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            # It may be writing, to somebody who does not read: that must not keep the run.
            self._thread.join(timeout=1.0)

    def finished(self, step: int) -> None:
        """A step has finished, or something else after it that may take long (an evaluation)."""
        self._step = step
        self._moment = time.monotonic()

    def _watch(self) -> None:
        patience = self._seconds
        while not self._ended.wait(patience):
            quiet = time.monotonic() - self._moment
            patience = self._seconds - quiet
            if patience <= 0:
                with contextlib.suppress(Exception):  # no stderr, nobody who reads it, …
                    self._tell(quiet)
                patience = self._seconds

    def _tell(self, quiet: float) -> None:
        stream = sys.__stderr__
        if stream is None:
            return
        since = f"since step {self._step}" if self._step else "yet"
        print(
            f"\nwarning: {self._who}: nothing has finished for {quiet:.0f} s (no step {since}); "
            f"waiting for {self._describe()}. All threads, innermost call first:",
            file=stream,
            flush=True,
        )
        faulthandler.dump_traceback(stream, all_threads=True)
