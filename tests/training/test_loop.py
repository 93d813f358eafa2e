"""The training loop: its order of work and its cadence."""

import contextlib
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.goodput import Ledger
from jaxllm.training import loop
from jaxllm.training.loop import EvalConfig, NonFiniteLoss
from jaxllm.training.recorder import LogConfig, Recorder


def test_metrics_are_fetched_after_the_next_step_was_sent(harness):
    harness.train(steps=4)
    assert harness.of("step", "fetch") == [
        ("step", 1),
        ("step", 2),
        ("fetch", 1),
        ("step", 3),
        ("fetch", 2),
        ("step", 4),
        ("fetch", 3),
        ("fetch", 4),
    ]


def test_at_a_boundary_the_order_is_log_checkpoint_evaluate(harness):
    harness.train(steps=4, evaluate=2, checkpoint=2)
    assert harness.events == [
        ("batch", 1),
        ("step", 1),
        ("batch", 2),
        ("step", 2),
        ("fetch", 1),
        ("log", 1),
        ("fetch", 2),
        ("log", 2),
        ("save", 2),
        ("evaluate", 2),
        ("record evaluation", 2),
        ("batch", 3),
        ("step", 3),
        ("batch", 4),
        ("step", 4),
        ("fetch", 3),
        ("log", 3),
        ("fetch", 4),
        ("log", 4),
        ("save", 4),
        ("evaluate", 4),
        ("record evaluation", 4),
    ]


def test_each_thing_has_its_own_cadence_and_the_last_step_has_all(harness):
    harness.train(steps=11, log=5, evaluate=4, checkpoint=3)
    assert [step for _, step in harness.of("log")] == [1, 5, 10, 11]
    assert [step for _, step in harness.of("save")] == [3, 6, 9, 11]
    assert [step for _, step in harness.of("evaluate")] == [4, 8, 11]


def test_the_state_and_what_was_measured_are_returned(harness):
    state, measured = harness.train(steps=5)
    assert int(state.step) == 5
    assert float(state.params["w"]) == 5
    assert measured["train/steps"] == 5
    assert measured["train/tokens_per_second"] > 0
    assert measured["time/compile"] >= 0


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def perf_counter(self):
        return self.now


def test_time_is_counted_in_steps_alone(harness):
    """Of each step's 4 s, 1 s is waiting for data; nothing else counts but the first step."""
    clock = Clock()
    harness.ledger = Ledger(clock.monotonic(), clock.monotonic)

    def passes(seconds):
        clock.now += seconds

    def source(step, state):
        passes(1)
        return harness._batch(step, state)

    def scores(step):
        passes(1000)
        return {"eval/loss": 1.0}

    harness.on_step = lambda step: passes(500 if step == 1 else 3)
    harness.scores = scores
    _, measured = harness.train(steps=5, evaluate=2, source=source)
    assert measured["train/data_wait_share"] == pytest.approx(1 / 4)
    # The first step is read once the second was sent: four steps of 4 tokens in three steps' time.
    assert measured["time/train"] == pytest.approx(3 * 4, abs=1e-6)
    assert measured["time/compile"] == pytest.approx(500 + 3)
    assert harness.ledger.spent("evaluation") == 2000 + 1000


def test_a_run_that_diverges_stops_and_names_the_fault(harness):
    harness.not_finite = {3, 4, 5, 6}
    with pytest.raises(NonFiniteLoss) as stopped:
        harness.train(steps=10, max_skipped=2)
    message = str(stopped.value)
    assert message.startswith("3 steps in a row up to step 5 had a loss or gradient")
    assert "batch 5 of step 5" in message
    assert harness.of("save") == []


def test_a_few_steps_that_are_not_finite_are_survived_and_counted(harness):
    harness.not_finite = {2, 3, 5, 6}
    state, _ = harness.train(steps=8, max_skipped=2)
    assert int(state.skipped) == 4
    lines = Recorder(RunDirectory(harness.folder), 8, LogConfig(), {}).history()
    assert math.isnan(lines[1]["train/loss"])
    assert lines[7]["train/skipped"] == 4


def test_a_run_that_diverges_at_a_checkpoint_does_not_save_it(harness):
    harness.not_finite = {4}
    with pytest.raises(NonFiniteLoss):
        harness.train(steps=10, max_skipped=0, checkpoint=2)
    assert harness.of("save") == [("save", 2)]


def test_an_evaluation_that_raises_finds_its_step_saved(harness):
    def scores(step):
        raise RuntimeError("no scores today")

    harness.scores = scores
    with pytest.raises(RuntimeError, match="no scores today"):
        harness.train(steps=6, evaluate=2, checkpoint=2)
    made, state = harness.run()
    assert made.checkpointer.steps() == [2]
    assert int(state.step) == 2


def test_a_restored_step_whose_evaluation_is_missing_is_evaluated_first(harness):
    def scores(step):
        raise KeyboardInterrupt

    harness.scores = scores
    with contextlib.suppress(KeyboardInterrupt):
        harness.train(steps=4, evaluate=2, checkpoint=2)
    harness.events.clear()
    harness.scores = lambda step: {"eval/loss": 1.0}
    harness.train(steps=4, evaluate=2, checkpoint=2)
    assert harness.events[:3] == [("evaluate", 2), ("record evaluation", 2), ("batch", 3)]
    harness.events.clear()
    harness.train(steps=4, evaluate=2, checkpoint=2)  # all is there: nothing to do
    assert harness.events == []


def test_a_restored_step_with_no_evaluation_due_is_not_evaluated(harness):
    with contextlib.suppress(NonFiniteLoss):
        harness.not_finite = {3}
        harness.train(steps=4, evaluate=4, checkpoint=2, max_skipped=0)
    harness.events.clear()
    harness.not_finite = set()
    harness.train(steps=4, evaluate=4, checkpoint=2, max_skipped=0)
    assert harness.of("evaluate") == [("evaluate", 4)]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0}, [4, 8]),
        ({2: 1.0, 4: 3.0, 6: 2.0, 8: 2.0}, [2, 8]),
        ({2: 4.0, 4: 3.0, 6: 2.0, 8: 1.0}, [8]),
        ({2: math.nan, 4: 1.0, 6: 2.0, 8: math.nan}, [4, 8]),
    ],
)
def test_the_checkpoint_of_the_lowest_evaluation_loss_stays(harness, losses, kept):
    harness.scores = lambda step: {"eval/loss": losses[step]}
    harness.train(steps=8, evaluate=2, checkpoint=2, keep=1)
    assert harness.run()[0].checkpointer.steps() == kept


def test_the_best_is_among_the_steps_that_have_a_checkpoint(harness):
    losses = {1: 0.0, 2: 2.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 3.0}
    harness.scores = lambda step: {"eval/loss": losses[step]}
    harness.train(steps=6, evaluate=1, checkpoint=2, keep=1)
    assert harness.run()[0].checkpointer.steps() == [2, 6]


def test_the_best_is_known_again_after_a_restart(harness):
    harness.scores = lambda step: {"eval/loss": {2: 1.0, 4: 2.0}.get(step, 3.0)}
    harness.train(steps=4, evaluate=2, checkpoint=2, keep=1)
    harness.train(steps=8, evaluate=2, checkpoint=2, keep=1)
    assert harness.run()[0].checkpointer.steps() == [2, 8]


def test_a_checkpoint_holds_frozen_parameters_too(harness):
    _, state = harness.run()
    frozen = {"base": {"w": jnp.ones(2)}}
    params, progress = loop.checkpoint_items(state, frozen)
    assert params.keys() == {"w", "base"}
    assert progress.keys() == {"step", "opt_state", "skipped", "skipped_in_a_row", "extra"}
    np.testing.assert_array_equal(params["base"]["w"], np.ones(2))
    assert loop.state_of(params, progress, "w") == (state, frozen)


def test_a_checkpoint_gives_the_average_to_others_and_the_parameters_to_its_run(harness):
    _, state = harness.run()
    frozen = {"base": {"w": jnp.ones(2)}}
    state = state.replace(average={"w": jnp.float32(0.5)}, extra={"coefficient": jnp.float32(3)})
    params, progress = loop.checkpoint_items(state, frozen)
    assert params == {"w": state.average["w"], **frozen}
    assert progress["params"] is state.params
    assert progress["extra"].keys() == {"coefficient"}
    assert loop.state_of(params, progress, "w") == (state, frozen)


@pytest.mark.parametrize("fields", [{"every": 0}, {"max_batches": -1}])
def test_the_configuration_is_checked(fields):
    with pytest.raises(ValueError, match="every, max_batches"):
        EvalConfig(**fields)
