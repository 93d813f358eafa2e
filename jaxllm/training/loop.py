"""The one training loop: every stage that updates parameters runs through `train`."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jaxllm import trees
from jaxllm.checkpoints.checkpointer import CheckpointConfig, Checkpointer
from jaxllm.errors import Preempted
from jaxllm.objectives.objective import Batch, Params
from jaxllm.preemption import StopRequest, deferred_stop
from jaxllm.reporting.progress import ProgressLine, training_fields
from jaxllm.sharding.processes import from_main
from jaxllm.training.recorder import LogConfig, Recorder
from jaxllm.training.state import TrainState
from jaxllm.training.step import StepMetrics, TrainStep


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When the model is evaluated on held-out data."""

    every: int = 500
    """Steps between evaluations; the last step always has one."""
    max_batches: int = 0
    """Batches of each evaluation, spread evenly over the text; 0: all. Final scores take all."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_batches < 0:
            raise ValueError("every, max_batches: must be positive (max_batches may be 0: all)")


@runtime_checkable
class Source(Protocol):
    """Where batches come from; on-policy sources ask `state` for a rollout."""

    def __call__(self, step: int, state: TrainState) -> Batch: ...


class NonFiniteLoss(Exception):
    """Training has skipped too many steps in a row; the message names the tensor at fault."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs; a stage puts it together."""

    steps: int
    step_function: TrainStep
    """The jitted train step; it donates the state."""
    frozen: Params
    """Parameters that are not trained."""
    source: Source
    evaluate: Callable[[int, TrainState], dict[str, float]]
    """Scores of the state after this many steps; `eval/loss` decides which checkpoint is best."""
    diagnose: Callable[[int, TrainState, Batch], str]
    """Names the first tensor that was not finite in the update that made this many steps."""
    recorder: Recorder
    checkpointer: Checkpointer
    log: LogConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    max_skipped: int
    """Steps in a row that may be skipped."""
    flops_per_token: float
    peak_flops: float | None
    """Of all devices together; None where it is not known."""
    source_scalars: Callable[[int], Mapping[str, float]] = lambda step: {}
    """What the source has to tell at a log point after so many steps."""


def train(run: Run, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Trains from `state` to `run.steps` updates.

    A step's metrics are read after the next step has been sent, so that the device never waits
    for the host. At each boundary the order is: log, checkpoint, evaluate; so a crash in an
    evaluation loses nothing.

    Returns:
        The final state, and what the run measured of itself: `train/tokens_per_second`,
        `train/data_wait_share` and the like, of this life of the process.

    Raises:
        Preempted: a signal came; the state has been saved.
        NonFiniteLoss: more than `run.max_skipped` steps in a row were not finite.
    """
    with deferred_stop() as stop, ProgressLine("step") as progress:
        loop = _Loop(run, progress)
        start = int(state.step)
        loop.evaluate_if_missing(start, state)
        for step in range(start, run.steps):
            batch = loop.next_batch(step, state)
            state, metrics = run.step_function(state, run.frozen, batch)
            loop.finish_previous(state)
            loop.sent(step + 1, metrics, batch)
            # Asked once: a signal that comes at a later line is heeded a step later.
            stopping = stop.after(step + 1)
            if loop.boundary(step + 1) or stopping:
                loop.finish_previous(state)
            due = step + 1 == run.steps or (step + 1) % run.checkpoint.every == 0
            if due or stopping or run.checkpointer.is_due_again():
                loop.save(step + 1, state)
            if stopping:
                raise loop.preempted(step + 1, stop)
            if step + 1 == run.steps or (step + 1) % run.eval.every == 0:
                loop.evaluate(step + 1, state)
        run.checkpointer.wait()
        if stop.signal:
            raise loop.preempted(run.steps, stop)
        return state, loop.measured()


class _Loop:
    """What the loop remembers between steps: the step under way, and the clock."""

    def __init__(self, run: Run, progress: ProgressLine) -> None:
        self._run = run
        self._progress = progress
        self._begin = time.monotonic()
        self._pending: tuple[int, StepMetrics, Batch] | None = None
        self._clock = _Clock()

    def boundary(self, step: int) -> bool:
        """Whether something after this step must see it finished."""
        run = self._run
        return step == run.steps or any(
            step % every == 0 for every in (run.checkpoint.every, run.eval.every)
        )

    def next_batch(self, step: int, state: TrainState) -> Batch:
        with self._clock.waiting():
            return self._run.source(step, state)

    def sent(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        self._pending = (step, metrics, batch)

    def finish_previous(self, state: TrainState) -> None:
        """Reads the metrics of the step sent before, logs them, and stops a run that diverged."""
        if self._pending is None:
            return
        step, on_device, batch = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._clock.step(metrics["tokens"])
        if metrics["skipped_in_a_row"] > self._run.max_skipped:
            raise NonFiniteLoss(
                f"{metrics['skipped_in_a_row']:.0f} steps in a row up to step {step} had a loss "
                f"or gradient that is not finite: {self._run.diagnose(step, state, batch)}. "
                "A lower learning rate, a longer warm-up or a smaller clip_norm may help."
            )
        self._log(step, metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        run = self._run
        speed = self._clock.tokens_per_second()
        mfu = speed * run.flops_per_token / run.peak_flops if run.peak_flops else None
        self._progress.update(
            step,
            run.steps,
            training_fields(metrics["loss"], metrics["learning_rate"], speed, mfu),
        )
        if step == 1 or step % run.log.every == 0 or step == run.steps:
            scalars = {f"train/{n}": value for n, value in metrics.items() if n != "tokens"}
            scalars["train/tokens_per_second"] = speed
            scalars["train/data_wait_share"] = self._clock.wait_share()
            if mfu is not None:
                scalars["train/mfu"] = mfu
            scalars |= run.source_scalars(step)
            run.recorder.record(step, self._seconds(), scalars)

    def save(self, step: int, state: TrainState) -> None:
        with self._clock.paused():
            params, progress = checkpoint_items(state, self._run.frozen)
            self._run.checkpointer.save(step, params, progress)

    def preempted(self, step: int, stop: StopRequest) -> Preempted:
        """What to raise when a signal ends the run after `step`."""
        self._run.checkpointer.wait()
        saved = step in self._run.checkpointer.steps()
        return Preempted(
            f"stopped by {stop.signal} after step {step}, "
            f"which {'is' if saved else 'could not be'} saved; run the same command again to go on",
            together=True,
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        with self._clock.paused():
            scores = self._run.evaluate(step, state)
            self._run.recorder.record(step, self._seconds(), scores)
            self._progress.message(
                f"step {step}: "
                + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            )
            self._mark_best()

    def evaluate_if_missing(self, step: int, state: TrainState) -> None:
        """Evaluates a restored state whose evaluation was due and did not come to its end."""
        self._mark_best()
        due = step > 0 and (step == self._run.steps or step % self._run.eval.every == 0)
        if due and step not in from_main(self._evaluated):
            self.evaluate(step, state)

    def _mark_best(self) -> None:
        self._run.checkpointer.mark_best(*from_main(self._evaluated))

    def _evaluated(self) -> list[int]:
        """The steps that were evaluated, the best first, those of no finite loss last."""

        def loss(line: Mapping[str, Any]) -> float:
            return line["eval/loss"] if math.isfinite(line["eval/loss"]) else math.inf

        lines = [line for line in self._run.recorder.history() if "eval/loss" in line]
        return [line["step"] for line in sorted(lines, key=loss)]

    def measured(self) -> dict[str, float]:
        return self._clock.measured() | {"train/steps": float(self._run.steps)}

    def _seconds(self) -> float:
        return time.monotonic() - self._begin


def checkpoint_items(state: TrainState, frozen: Params) -> tuple[Any, Mapping[str, Any]]:
    """The state as a checkpoint holds it: `params`, which later stages read, and the rest.

    `params` are all parameters; those that are averaged as their average, and themselves in the
    rest.
    """
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    average = rest.pop("average")
    given_on = rest.pop("params") if average is None else average
    return trees.merge(given_on, frozen), rest


def state_of(
    params: Params, rest: Mapping[str, Any], trainable: str
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the parameters not trained, of a checkpoint's items.

    The inverse of `checkpoint_items`; `trainable` is the pattern that the run splits them by.
    """
    trained, frozen = trees.split(params, trainable)
    if "params" in rest:
        return TrainState(average=trained, **rest), frozen
    return TrainState(params=trained, **rest), frozen


class _Clock:
    """Time in steps, without compilation, evaluation and checkpoints; and waiting for data."""

    def __init__(self) -> None:
        self._mark: float | None = None
        self._wait = 0.0
        self._recent: list[tuple[float, float]] = []
        self._seconds = self._tokens = self._waited = 0.0
        self.compile_seconds = 0.0
        self._started = time.monotonic()

    def waiting(self) -> "_Span":
        return _Span(self._add_wait)

    def paused(self) -> "_Span":
        return _Span(self._skip)

    def _add_wait(self, seconds: float) -> None:
        self._wait += seconds

    def _skip(self, seconds: float) -> None:
        if self._mark is not None:
            self._mark += seconds

    def step(self, tokens: float) -> None:
        """A step has ended; the first one, which compiles, only starts the clock."""
        now = time.monotonic()
        if self._mark is None:
            self.compile_seconds = now - self._started
        else:
            self._seconds += now - self._mark
            self._tokens += tokens
            self._waited += self._wait
            self._recent = [*self._recent[-19:], (now - self._mark, tokens)]
        self._mark, self._wait = now, 0.0

    def tokens_per_second(self) -> float:
        """Over the last steps."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else 0.0

    def wait_share(self) -> float:
        """Share of all step time that was spent waiting for data."""
        return self._waited / self._seconds if self._seconds else 0.0

    def measured(self) -> dict[str, float]:
        if not self._seconds:
            return {}
        return {
            "train/tokens_per_second": self._tokens / self._seconds,
            "train/data_wait_share": self.wait_share(),
            "time/compile": self.compile_seconds,
            "time/train": self._seconds,
        }


class _Span:
    """A context manager that gives its seconds to a function."""

    def __init__(self, receive: Callable[[float], None]) -> None:
        self._receive = receive

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._receive(time.monotonic() - self._begin)
