"""The training loop when a signal comes, or a save fails."""

import signal

import orbax.checkpoint as ocp
import pytest

from jaxllm.errors import Preempted
from jaxllm.training.loop import train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_under_way(harness, number):
    harness.on_step = lambda step: step == 3 and signal.raise_signal(number)
    with pytest.raises(Preempted) as stopped:
        harness.train(steps=10, log=5)
    assert str(stopped.value).startswith(f"stopped by {number.name} after step 3, which is saved;")
    assert harness.of("save") == [("save", 3)]
    harness.on_step = lambda step: None
    harness.train(steps=5, log=5)
    assert [step for _, step in harness.of("log")] == [1, 5]


class SignalAt(list):
    """Events, at the n-th of which a signal comes."""

    def __init__(self, number):
        super().__init__()
        self._number = number

    def append(self, event):
        super().append(event)
        if len(self) == self._number:
            signal.raise_signal(signal.SIGTERM)


# Of four steps: a batch, a step, a fetch and a log line each; two saves, two evaluations.
@pytest.mark.parametrize("number", range(1, 23))
def test_a_signal_at_any_moment_loses_no_step_and_no_line(harness, number):
    harness.events = SignalAt(number)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step"):
        harness.train(steps=4, evaluate=3, checkpoint=3)
    made, state = harness.run(steps=4, evaluate=3, checkpoint=3)
    assert [line["step"] for line in made.recorder.history() if "train/loss" in line] == list(
        range(1, int(state.step) + 1)
    )
    assert int(state.step) == max(step for _, step in harness.of("step"))


def test_a_signal_when_the_disk_is_full_does_not_claim_to_have_saved(harness, monkeypatch):
    monkeypatch.setattr("jaxllm.checkpoints.checkpointer._STOP_WAITS", (0.0, 0.0))
    harness.on_step = lambda step: step == 2 and signal.raise_signal(signal.SIGTERM)
    made, state = harness.run(steps=4)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(made.checkpointer._orbax, "save", full)
    with pytest.raises(Preempted, match="after step 2, which could not be saved"):
        train(made, state)


def test_lines_that_wait_for_room_are_written_before_each_checkpoint(harness, monkeypatch):
    made, state = harness.run(steps=4, checkpoint=2)
    save, calls = made.checkpointer.save, []

    def saving(step, *items):
        calls.append(step)
        save(step, *items)

    monkeypatch.setattr(made.recorder, "flush", lambda: calls.append("flush"))
    monkeypatch.setattr(made.checkpointer, "save", saving)
    train(made, state)
    assert calls == ["flush", 2, "flush", 4]


def test_a_save_that_is_tried_again_finds_its_step_in_the_log(harness, monkeypatch):
    monkeypatch.setattr("jaxllm.checkpoints.checkpointer._WAITS", (0.0,))
    made, state = harness.run(steps=6, checkpoint=3)
    save, logged = ocp.AsyncCheckpointer.save, []

    def down_at_first(self, path, *args, **kwargs):
        logged.append((int(path.name), made.recorder.history()[-1]["step"]))
        if len(logged) == 1:
            raise OSError("No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", down_at_first)
    train(made, state)
    assert logged == [(3, 3), (4, 4), (6, 6)]
