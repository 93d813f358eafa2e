"""One line that tells how far a phase is: redrawn in place on a terminal, sparse lines elsewhere.

Why not a library: tqdm writes its carriage returns into pipes and log files as well, and
`rich.live` writes nothing there until the end, and hides the cursor, which a killed run leaves
hidden. From rich come the judgement whether this is a terminal, its width, and the width of
characters.
"""

import collections
import io
import time
from collections.abc import Callable, Mapping

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from jaxllm.reporting import quantities
from jaxllm.reporting.quantities import Number

REDRAW_SECONDS = 0.1
"""On a terminal: often enough to look alive, rare enough to cost nothing."""

SPEED_WINDOW_SECONDS = 30.0
"""Remaining time is judged by the speed of this last stretch."""

CLEAR_LINE = "\r\x1b[K"
GAP = "  "


class ProgressLine:
    """Shows `update`s as one line: `step 120/600  20%  loss 3.214  10.2k tok/s  ETA 1m32s`.

    The time left is judged by recent speed between updates. The first update only starts the
    clock: what came before it (compilation, or steps of an earlier run) says nothing about speed.

    Output that fails (a closed pipe, a full disk under a redirected log) ends the display, never
    the run.

    Args:
        name: what is counted, such as "step" or "tokenise".
        stream: where to write; standard error by default, so that results can be piped.
        plain_seconds: where the stream is no terminal, at least this long between lines.
        clock: seconds from anywhere; for tests.
    """

    def __init__(
        self,
        name: str,
        stream: io.TextIOWrapper | io.StringIO | None = None,
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name = name
        self._console = Console(file=stream, stderr=stream is None)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._interval = REDRAW_SECONDS if self._live else plain_seconds
        self._clock = clock
        self._history: collections.deque[tuple[float, int]] = collections.deque()
        self._line = ""
        self._shown_line = ""
        self._shown_at = float("-inf")
        self._broken = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(
        self, done: int, total: int, fields: Mapping[str, str | Number] | None = None
    ) -> None:
        """Tells that `done` of `total` are done, with `fields` to show in their order.

        A field is shown as `name value`, but a rate, whose name ends in "/s", as `value name`.
        Numbers get four significant digits, rates a thousands letter; strings stay as they are.
        A total of 0 means that it is not known: neither percentage nor time left are shown.
        """
        now = self._clock()
        self._remember(now, done)
        parts = [f"{self._name} {done:,}/{total:,}" if total else f"{self._name} {done:,}"]
        if total:
            parts.append(f"{100 * done // total}%")
        parts += [_field(name, value) for name, value in (fields or {}).items()]
        remaining = self._seconds_left(done, total)
        if remaining is not None:
            parts.append(f"ETA {quantities.duration(remaining)}")
        self._line = GAP.join(parts)
        if now - self._shown_at >= self._interval or (total and done >= total):
            self._show(now)

    def message(self, text: str) -> None:
        """Prints `text` above the line, on a line of its own."""
        if not self._live:
            self._write(f"{text}\n")
            return
        self._write(f"{CLEAR_LINE}{text}\n{self._fitted(self._shown_line)}")

    def close(self) -> None:
        """Shows the last update, if it has not been shown, and ends the line."""
        if self._line != self._shown_line:
            self._show(self._clock())
        if self._live and self._shown_line:
            self._write("\n")
        self._line = self._shown_line = ""

    def _show(self, now: float) -> None:
        if self._line == self._shown_line:
            return
        self._shown_at, self._shown_line = now, self._line
        self._write(CLEAR_LINE + self._fitted(self._line) if self._live else f"{self._line}\n")

    def _fitted(self, line: str) -> str:
        # The last column stays free: a character there makes some terminals wrap.
        width = max(self._console.width - 1, 0)
        parts = line.split(GAP)
        # Too narrow: fields go from the right, but the time left, which ends the line, stays.
        while cell_len(GAP.join(parts)) > width and len(parts) > 2:
            del parts[-2]
        line = GAP.join(parts)
        return line if cell_len(line) <= width else set_cell_size(line, width)

    def _remember(self, now: float, done: int) -> None:
        history = self._history
        if not history or now - history[-1][0] >= REDRAW_SECONDS:
            history.append((now, done))
        while len(history) > 2 and history[1][0] <= now - SPEED_WINDOW_SECONDS:
            history.popleft()

    def _seconds_left(self, done: int, total: int) -> float | None:
        if not total or done >= total or len(self._history) < 2:
            return None
        (first_time, first_done), (last_time, last_done) = self._history[0], self._history[-1]
        if last_done <= first_done:
            return None
        return (total - done) * (last_time - first_time) / (last_done - first_done)

    def _write(self, text: str) -> None:
        if self._broken:
            return
        try:
            self._console.file.write(text)
            self._console.file.flush()
        except OSError:
            self._broken = True


def training_fields(
    loss: Number,
    learning_rate: Number,
    tokens_per_second: Number,
    mfu: Number | None = None,
    reward: Number | None = None,
) -> dict[str, str | Number]:
    """The fields of a training step; `mfu` is a fraction, and left out where no peak is known,
    `reward` that of what a policy writes."""
    fields: dict[str, str | Number] = {} if reward is None else {"reward": f"{reward:.3f}"}
    fields |= {
        "loss": f"{loss:.3f}",
        "lr": f"{learning_rate:.1e}",
        "tok/s": tokens_per_second,
    }
    if mfu is not None:
        fields["MFU"] = quantities.share(mfu)
    return fields


def _field(name: str, value: str | Number) -> str:
    if name.endswith("/s"):
        return f"{value if isinstance(value, str) else quantities.count(value)} {name}"
    return f"{name} {value if isinstance(value, str) else quantities.number(value)}"
