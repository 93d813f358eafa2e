"""Scalars in TensorBoard's own files, written where they are recorded.

tensorboardX's `SummaryWriter` writes from a thread, which a full disk ends; whoever records more
than its queue holds then waits for ever.
"""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_FLUSH_SECONDS = 10.0


class EventFile:
    """The scalars of a run from a step on; TensorBoard drops what earlier files hold of it.

    Scalars that cannot be written (the disk is full) are lost; a new file goes on after them.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """Writes into `folder`, which need not be there yet, from the step `first` on."""
        self._folder, self._first = folder, first
        self._writer: EventsWriter | None = None
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars by name at `step`."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            if self._writer is None:
                self._writer = self._opened(step)
            self._writer.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush(self._writer)
        except OSError:
            if self._writer is not None:
                # Half an event may be there, and TensorBoard reads no further.
                self._writer, self._first = None, step + 1

    def close(self) -> None:
        """Writes what waits to be written."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _opened(self, step: int) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(self._folder / "events"), f".{step}")
        begin = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=self._first, session_log=begin))
        self._flush(writer)
        return writer

    def _flush(self, writer: EventsWriter) -> None:
        writer.flush()
        self._flushed = time.monotonic()
