"""A run of the training loop whose step only counts, and which notes what happens in what order."""

import math
import time

import jax
import jax.numpy as jnp
import pytest

from jaxllm.checkpoints.checkpointer import CheckpointConfig, Checkpointer
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.goodput import Ledger
from jaxllm.training import loop
from jaxllm.training.loop import EvalConfig, Run, Stream, train
from jaxllm.training.recorder import LogConfig, Recorder
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import Watchdog


class RecordingRecorder(Recorder):
    def __init__(self, run, start, events):
        super().__init__(run, start, LogConfig(), {})
        self._events = events

    def record(self, step, seconds, scalars):
        kind = "log" if "train/loss" in scalars else "record evaluation"
        self._events.append((kind, step))
        super().record(step, seconds, scalars)


class RecordingCheckpointer(Checkpointer):
    def __init__(self, directory, keep, events):
        self.events = events
        super().__init__(directory, keep)

    def save(self, step, params, progress):
        self.events.append(("save", step))
        super().save(step, params, progress)


class Harness:
    """A run of a step that only counts; events are noted in order."""

    def __init__(self, folder, monkeypatch):
        self.events = []
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.not_finite = set()
        self.on_step = lambda step: None
        self.scores = lambda step: {"eval/loss": 1.0}
        self.ledger = Ledger(time.monotonic())
        self._opened = []
        self._metrics = {}
        fetch = jax.device_get

        def device_get(tree):
            if isinstance(tree, dict) and id(tree.get("loss")) in self._metrics:
                self.events.append(("fetch", self._metrics[id(tree["loss"])][0]))
            return fetch(tree)

        monkeypatch.setattr(jax, "device_get", device_get)

    def run(self, steps=6, log=1, evaluate=100, checkpoint=100, max_skipped=2, keep=9, source=None):
        """A `Run` in the folder, and the state that it begins with, restored if there is one."""
        directory = RunDirectory(self.folder)
        checkpointer = RecordingCheckpointer(directory.checkpoints, keep, self.events)
        state = TrainState(
            step=jnp.int32(0),
            params={"w": jnp.zeros(())},
            opt_state={},
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
            extra={},
        )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        items = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
            loop.checkpoint_items(state, {}),
        )
        restored = checkpointer.restore(*items)
        if restored is not None:
            state = TrainState(params=restored[1], **restored[2])
        recorder = RecordingRecorder(directory, int(state.step), self.events)
        self._opened += [recorder, checkpointer]
        self.ledger.resumed(int(state.step))
        made = Run(
            steps=steps,
            step_function=self._step,
            frozen={},
            kept={},
            stream=Stream(source or self._batch, 1),
            complete=lambda params, frozen, batch: batch,
            evaluate=self._evaluate,
            diagnose=lambda step, state, batch: f"batch {int(batch['tokens'][0])} of step {step}",
            recorder=recorder,
            ledger=self.ledger,
            watchdog=Watchdog(0.0, str),
            checkpointer=checkpointer,
            log=LogConfig(every=log),
            eval=EvalConfig(every=evaluate),
            checkpoint=CheckpointConfig(every=checkpoint),
            max_skipped=max_skipped,
            flops_per_token=1.0,
            peak_flops=None,
        )
        return made, state

    def train(self, **options):
        made, state = self.run(**options)
        try:
            return train(made, state)
        finally:
            self.close()

    def close(self):
        while self._opened:
            self._opened.pop().close()

    def of(self, *kinds):
        return [event for event in self.events if event[0] in kinds]

    def _batch(self, step, state):
        self.events.append(("batch", step + 1))
        return {"tokens": jnp.full(4, step + 1)}

    def _step(self, state, frozen, batch):
        step = int(batch["tokens"][0])
        assert step == int(state.step) + 1
        self.events.append(("step", step))
        self.on_step(step)
        bad = step in self.not_finite
        in_a_row = (int(state.skipped_in_a_row) + 1) * bad
        metrics = {
            "loss": jnp.float32(math.nan if bad else 1 / step),
            "learning_rate": jnp.float32(0.1),
            "tokens": jnp.float32(4),
            "skipped": jnp.float32(int(state.skipped) + bad),
            "skipped_in_a_row": jnp.float32(in_a_row),
        }
        self._metrics[id(metrics["loss"])] = (step, metrics)  # held, so that ids stay unique
        state = state.replace(
            step=jnp.int32(step),
            params={"w": state.params["w"] + 1},
            skipped=jnp.int32(int(state.skipped) + bad),
            skipped_in_a_row=jnp.int32(in_a_row),
        )
        return state, metrics

    def _evaluate(self, step, state):
        assert int(state.step) == step
        self.events.append(("evaluate", step))
        return self.scores(step)


@pytest.fixture
def harness(tmp_path, monkeypatch):
    made = Harness(tmp_path / "run", monkeypatch)
    yield made
    made.close()
