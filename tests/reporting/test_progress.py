"""The progress line on a terminal and in a pipe."""

import io
import re

import pytest
from rich.cells import cell_len

from jaxllm.reporting.progress import CLEAR_LINE, ProgressLine, training_fields


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_a_training_step_reads_as_documented(clock):
    stream = io.StringIO()
    line = ProgressLine("step", stream, plain_seconds=0.0, clock=clock)
    line.update(0, 600)
    clock.now += 30
    line.update(120, 600, training_fields(3.2141, 9.1e-4, 10_234, 0.41))
    assert stream.getvalue().splitlines()[-1] == (
        "step 120/600  20%  loss 3.214  lr 9.1e-04  10.2k tok/s  MFU 41.0%  ETA 2m00s"
    )


def test_mfu_is_left_out_where_no_peak_is_known():
    assert "MFU" not in training_fields(3.0, 1e-3, 100.0)


def test_a_pipe_gets_whole_lines_seldom_and_the_last(clock):
    stream = io.StringIO()
    with ProgressLine("step", stream, plain_seconds=10.0, clock=clock) as line:
        for step in range(26):
            line.update(step, 100)
            clock.now += 1
    shown = [int(found) for found in re.findall(r"^step (\d+)/", stream.getvalue(), re.M)]
    assert shown == [0, 10, 20, 25]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_finish_is_shown_at_once_and_once(clock):
    stream = io.StringIO()
    with ProgressLine("step", stream, clock=clock) as line:
        line.update(1, 2)
        line.update(2, 2)
    assert stream.getvalue() == "step 1/2  50%\nstep 2/2  100%\n"


def test_compilation_does_not_spoil_the_time_left(clock):
    stream = io.StringIO()
    line = ProgressLine("step", stream, plain_seconds=0.0, clock=clock)
    clock.now += 500  # compiling
    line.update(1, 101)
    assert "ETA" not in stream.getvalue()
    clock.now += 1
    line.update(11, 101)
    assert stream.getvalue().endswith("ETA 9.0s\n")


def test_time_left_follows_recent_speed(clock):
    stream = io.StringIO()
    line = ProgressLine("step", stream, plain_seconds=0.0, clock=clock)
    for step in range(100):  # a step a second ...
        line.update(step, 1000)
        clock.now += 1
    for step in range(100, 200):  # ... then two seconds each, for longer than the window
        line.update(step, 1000)
        clock.now += 2
    assert "ETA 26m42s" in stream.getvalue().splitlines()[-1]  # 801 steps of two seconds


def test_a_resumed_run_counts_only_its_own_steps(clock):
    stream = io.StringIO()
    line = ProgressLine("step", stream, plain_seconds=0.0, clock=clock)
    line.update(500, 600)
    clock.now += 10
    line.update(510, 600)
    assert stream.getvalue().endswith("ETA 1m30s\n")


def test_an_unknown_total_shows_neither_share_nor_time_left(clock):
    stream = io.StringIO()
    line = ProgressLine("documents", stream, plain_seconds=0.0, clock=clock)
    line.update(0, 0)
    clock.now += 1
    line.update(12_000, 0, {"MB/s": 3.21})
    assert stream.getvalue().splitlines()[-1] == "documents 12,000  3.21 MB/s"


def test_a_terminal_gets_one_line_redrawn_in_place(terminal, clock):
    with ProgressLine("step", terminal, clock=clock) as line:
        for step in range(1, 4):
            line.update(step, 3)
            clock.now += 1
    written = terminal.getvalue()
    assert written.count(CLEAR_LINE) == 3
    assert written.count("\n") == 1 and written.endswith("step 3/3  100%\n")


def test_a_terminal_is_not_redrawn_more_often_than_it_can_be_read(terminal, clock):
    line = ProgressLine("step", terminal, clock=clock)
    for step in range(1000):
        line.update(step, 10_000)
        clock.now += 0.001
    assert terminal.getvalue().count(CLEAR_LINE) <= 11


@pytest.mark.parametrize("name", ["loss", "损失"])
def test_a_line_never_wraps(terminal, clock, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "40")
    line = ProgressLine("step", terminal, clock=clock)
    fields = dict.fromkeys((f"{name}{position}" for position in range(20)), 1.5)
    line.update(1, 9, fields)
    clock.now += 1
    line.update(2, 9, fields)
    first, second = terminal.getvalue().split(CLEAR_LINE)[1:]
    assert max(cell_len(first), cell_len(second)) <= 39
    assert second.startswith("step 2/9  22%") and second.endswith("ETA 7.0s")


def test_even_a_very_narrow_terminal_is_not_wrapped(terminal, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "8")
    ProgressLine("step", terminal, clock=clock).update(1, 1000)
    assert terminal.getvalue() == f"{CLEAR_LINE}step 1/"


def test_a_message_stands_above_the_line(terminal, clock):
    line = ProgressLine("step", terminal, clock=clock)
    line.update(1, 2)
    line.message("saved")
    assert terminal.getvalue().endswith(f"{CLEAR_LINE}saved\nstep 1/2  50%")


def test_output_that_fails_does_not_stop_the_run(clock):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with ProgressLine("step", Closed(), clock=clock) as line:
        line.update(1, 2)
        line.message("still here")
        line.update(2, 2)
