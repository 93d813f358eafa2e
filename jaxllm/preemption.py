"""SIGTERM and Ctrl-C: the run saves at the next step boundary, and ends to be run again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxllm.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signal: str = ""
        """The name of the signal that came, or empty."""

    def __bool__(self) -> bool:
        return bool(self.signal)


def end_on_signals() -> None:
    """Outside a training loop, where there is nothing to save: a signal ends the run at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"stopped by {signal.Signals(number).name}; run the same command again")

    for number in _SIGNALS:
        signal.signal(number, handler)


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Inside, a signal only makes the `StopRequest` true; a second one ends the run at once."""
    request = StopRequest()
    outside = {number: signal.getsignal(number) for number in _SIGNALS}

    def handler(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        for other, previous in outside.items():
            signal.signal(other, previous)

    for number in _SIGNALS:
        signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, previous in outside.items():
            signal.signal(number, previous)
