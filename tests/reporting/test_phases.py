"""Phases before training: one line each, and the seconds they took."""

import pytest

from jaxllm.reporting import phases as module
from jaxllm.reporting.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_each_phase_is_timed_from_its_first_call_to_its_end(clock):
    phases = Phases()
    phases("read", 0, 0)
    clock.now += 2
    phases("read", 5, 0)
    clock.now += 1
    phases("read", 9, 9)
    clock.now += 50  # between phases: nobody's
    phases("tokenise train", 0, 10)
    clock.now += 4
    phases("tokenise train", 10, 10)
    assert phases.seconds == pytest.approx({"read": 3, "tokenise train": 4})


def test_an_end_that_is_told_twice_counts_once(clock, capsys):
    phases = Phases()
    phases("read", 0, 9)
    clock.now += 3
    phases("read", 9, 9)
    lines = capsys.readouterr().err
    clock.now += 50
    phases("read", 9, 9)
    assert phases.seconds == pytest.approx({"read": 3})
    assert lines
    assert capsys.readouterr().err == ""


def test_the_next_phase_ends_one_that_did_not_say_it_was_done(clock):
    phases = Phases()
    phases("read", 0, 0)
    clock.now += 2
    phases("train tokenizer", 0, 5)
    clock.now += 3
    phases.close()
    phases.close()
    assert phases.seconds == pytest.approx({"read": 2, "train tokenizer": 3})


def test_each_phase_has_a_line_of_its_own(capsys):
    phases = Phases()
    phases("read", 0, 10)
    phases("read", 10, 10)
    phases("tokenise", 0, 10)
    phases("tokenise", 10, 10)
    error = capsys.readouterr().err
    assert "read" in error
    assert "tokenise" in error
    assert capsys.readouterr().out == ""


def test_a_phase_that_comes_again_is_timed_again(clock):
    phases = Phases()
    for seconds in (3, 5):
        phases("train tokenizer", 0, 9)
        clock.now += seconds
        phases("train tokenizer", 9, 9)
        phases("train tokenizer", 9, 9)
    assert phases.seconds == pytest.approx({"train tokenizer": 5})
