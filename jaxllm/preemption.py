"""SIGTERM and Ctrl-C: the run saves at the next step boundary, and ends to be run again."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxllm.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TWICE_SECONDS = 1.0
"""Signals that come so close together are one: a cluster may tell a process and its parent, which
passes it on."""
_SOON_SECONDS = 5.0
"""How long after a signal an error is its consequence."""


class StopRequest:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signal: str = ""
        """The name of the signal that came, or empty."""
        self.came = -math.inf
        """When, on the monotonic clock."""

    def after(self, step: int) -> bool:
        """Whether to stop after this step; asked once after each."""
        return bool(self.signal)


class _AgreedStopRequest(StopRequest):
    """The same for several processes: a signal to one of them stops all, after the same step."""

    def after(self, step: int) -> bool:
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = "a signal to one of its processes"
        return bool(self.signal)


def end_on_signals() -> StopRequest:
    """Outside a training loop, where there is nothing to save: a signal ends the run at once.

    It raises `Preempted` at whatever line is run, and not all code lets that through: while a
    library written in C is loaded it becomes an `ImportError`. So the result tells, too, that one
    came.
    """
    request = StopRequest()

    def handler(number: int, frame: FrameType | None) -> None:
        before, request.came = request.came, time.monotonic()
        if request.came - before > _TWICE_SECONDS:
            request.signal = signal.Signals(number).name
            raise _ended_by(request)

    for number in _SIGNALS:
        signal.signal(number, handler)
    return request


@contextmanager
def ended_by(request: StopRequest) -> Iterator[None]:
    """Inside, an error that soon follows a signal of `end_on_signals` is taken for its consequence.

    Raises:
        Preempted: there was such an error.
    """
    try:
        yield
    except Exception as error:
        if time.monotonic() - request.came < _SOON_SECONDS:
            raise _ended_by(request) from error
        raise


def _ended_by(request: StopRequest) -> Preempted:
    return Preempted(f"stopped by {request.signal}; run the same command again")


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Inside, a signal only makes the `StopRequest` true; a second one ends the run at once."""
    from jax._src.distributed import global_state

    if global_state.client is None:
        yield from _deferred_by_handlers()
    else:
        yield from _deferred_by_service(global_state)


def _deferred_by_handlers() -> Iterator[StopRequest]:
    request, came = StopRequest(), math.inf
    outside = {number: signal.getsignal(number) for number in _SIGNALS}

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if time.monotonic() - came > _TWICE_SECONDS:
            raise Preempted(f"stopped twice, by {request.signal}; run the same command again")
        request.signal, came = signal.Signals(number).name, time.monotonic()

    for number in _SIGNALS:
        signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, previous in outside.items():
            signal.signal(number, previous)


def _deferred_by_service(processes: Any) -> Iterator[StopRequest]:
    """By JAX's own service, which takes SIGTERM for itself from when it begins."""
    import jax

    outside = {int(number): signal.getsignal(number) for number in _SIGNALS}
    jax.config.update("jax_enable_preemption_service", True)
    if processes.preemption_sync_manager is not None:
        processes.preemption_sync_manager.shutdown()
        processes.preemption_sync_manager = None
    processes.initialize_preemption_sync_manager()

    came = math.inf

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if time.monotonic() - came > _TWICE_SECONDS:
            raise Preempted("stopped twice, by SIGINT; run the same command again")
        came = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, handler)
    try:
        yield _AgreedStopRequest()
    finally:
        for number, previous in outside.items():
            signal.signal(number, previous)
