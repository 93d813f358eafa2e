"""SIGTERM and Ctrl-C: when they end a run at once, and when they wait for the step."""

import signal
import time

import pytest

from jaxllm import preemption
from jaxllm.errors import Preempted
from jaxllm.preemption import deferred_stop, end_on_signals, ended_by

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def _restored_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_a_signal_ends_the_run_at_once(number):
    end_on_signals()
    with pytest.raises(Preempted, match=f"stopped by {number.name}; run the same command again"):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_inside_a_signal_is_only_noted(number):
    end_on_signals()
    with deferred_stop() as stop:
        assert not stop.after(1)
        signal.raise_signal(number)
        assert stop.after(2)
        assert stop.signal == number.name


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_ends_the_run_at_once(first, second, monkeypatch):
    monkeypatch.setattr(preemption, "_TWICE_SECONDS", 0.01)
    end_on_signals()
    with pytest.raises(Preempted, match=f"stopped twice, by {first.name}"), deferred_stop():
        signal.raise_signal(first)
        time.sleep(0.02)
        signal.raise_signal(second)


def test_signals_that_come_together_are_one():
    """A cluster may signal a process and its parent, which passes it on."""
    end_on_signals()
    with deferred_stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.after(1)
    with pytest.raises(Preempted):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


def test_the_handlers_of_before_are_back_afterwards():
    end_on_signals()
    before = [signal.getsignal(number) for number in SIGNALS]
    with deferred_stop():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(RuntimeError), deferred_stop():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_error_soon_after_a_signal_is_its_consequence(monkeypatch):
    request = end_on_signals()
    with pytest.raises(KeyError), ended_by(request):
        raise KeyError  # nothing came
    with pytest.raises(Preempted):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Preempted, match="stopped by SIGINT"), ended_by(request):
        raise KeyError
    monkeypatch.setattr(preemption, "_SOON_SECONDS", 0.0)
    with pytest.raises(KeyError), ended_by(request):
        raise KeyError


def test_no_handler_of_errors_takes_a_signal_for_one():
    """It may come at any line, also where damage to a file is survived."""
    end_on_signals()
    survived = False
    with pytest.raises(Preempted):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            survived = True
    assert not survived
