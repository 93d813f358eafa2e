"""Phases before training (reading, tokenising): a progress line each, and the seconds they took."""

import time

from jaxllm.reporting.progress import ProgressLine


class Phases:
    """Called as `phases(name, done, total)`; a phase ends when all is done or another begins.

    One that has ended begins anew when it is told again that nothing is done.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds that each phase took, the last time, by name."""
        self._name = ""
        self._line: ProgressLine | None = None
        self._begin = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name or (self._line is None and not done):
            self.close()
            self._name, self._line, self._begin = name, ProgressLine(name), time.monotonic()
        if self._line is None:
            return
        self._line.update(done, total)
        if total and done >= total:
            self.close()

    def close(self) -> None:
        """Ends the phase under way."""
        if self._line is not None:
            self._line.close()
            self.seconds[self._name] = time.monotonic() - self._begin
        self._line = None
