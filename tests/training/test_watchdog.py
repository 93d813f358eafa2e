"""The watchdog: silent while all is well, and telling enough when it is not."""

import sys
import threading
import time

import pytest

from jaxllm.reporting.goodput import CATEGORIES
from jaxllm.training.watchdog import Watchdog, waited_for


@pytest.fixture
def stderr(tmp_path, monkeypatch):
    """What is written to the real standard error."""
    path = tmp_path / "stderr"
    with path.open("w") as file:
        monkeypatch.setattr(sys, "__stderr__", file)
        yield path.read_text


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_tells_what_is_waited_for_and_where(stderr):
    with Watchdog(0.1, lambda: "the next batch") as watchdog:
        watchdog.finished(12)
        a_function_that_hangs(lambda: "test_watchdog.py" in stderr())
    text = stderr()
    assert (
        "nothing has finished for 0 s (no step since step 12); waiting for the next batch" in text
    )
    assert "process 0 on " in text
    assert "in a_function_that_hangs" in text
    assert "Thread" in text and "in _watch" in text  # all threads


def a_function_that_hangs(until):
    wait_until(until)


def test_it_tells_again_after_each_further_time(stderr):
    with Watchdog(0.05, lambda: "a step") as watchdog:
        wait_until(lambda: stderr().count("waiting for a step") >= 3)
        assert "(no step yet)" in stderr()
        watchdog.finished(1)
        wait_until(lambda: "(no step since step 1)" in stderr())


def test_it_is_silent_while_steps_finish_and_after_the_end(stderr):
    begin = time.monotonic()
    with Watchdog(2.0, lambda: "a step") as watchdog:
        for step in range(30):
            time.sleep(0.1)
            watchdog.finished(step)
    assert time.monotonic() - begin > 2.0
    with Watchdog(0.2, lambda: "a step"):
        pass
    time.sleep(0.5)
    assert stderr() == ""
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_zero_seconds_watch_nothing(stderr):
    before = threading.active_count()
    with Watchdog(0.0, lambda: "a step") as watchdog:
        watchdog.finished(1)
        assert threading.active_count() == before
        time.sleep(0.1)
    assert stderr() == ""


def test_what_it_cannot_tell_ends_nothing(monkeypatch, stderr):
    told = []

    def describe():
        told.append(1)
        raise ValueError("no description")

    with Watchdog(0.02, describe):
        wait_until(lambda: len(told) >= 2)  # it goes on after an error of its own
        monkeypatch.setattr(sys, "__stderr__", None)
        time.sleep(0.1)


def test_an_error_in_the_block_passes_through(stderr):
    with pytest.raises(KeyError), Watchdog(5.0, lambda: "a step"):
        raise KeyError


def test_a_step_costs_microseconds():
    with Watchdog(60.0, lambda: "a step") as watchdog:
        begin = time.process_time()
        for step in range(1000):
            watchdog.finished(step)
        assert time.process_time() - begin < 0.1


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_can_be_waited_for(category):
    assert waited_for(category)
