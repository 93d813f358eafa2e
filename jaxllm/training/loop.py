"""The one training loop: every stage that updates parameters runs through `train`."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jaxllm import trees
from jaxllm.checkpoints.checkpointer import CheckpointConfig, Checkpointer
from jaxllm.errors import Preempted
from jaxllm.objectives.objective import Batch, Complete, Memory, Params
from jaxllm.preemption import StopRequest, deferred_stop
from jaxllm.reporting.goodput import Ledger
from jaxllm.reporting.progress import ProgressLine, training_fields
from jaxllm.sharding.processes import from_main
from jaxllm.training.recorder import LogConfig, Recorder
from jaxllm.training.replicas import check_replicas
from jaxllm.training.state import TrainState
from jaxllm.training.step import StepMetrics, TrainStep
from jaxllm.training.watchdog import Watchdog


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


Prepare = Callable[[int, Params, Memory], Memory]
"""`prepare(step, params, extra) -> extra`, of all parameters."""


class Stream(NamedTuple):
    """Where the batches of a run come from."""

    source: Source
    seq_len: int
    """Tokens of a row."""
    scalars: Callable[[int], Mapping[str, float]] = lambda step: {}
    """What there is to tell at a log point after so many steps."""
    prepare: Prepare = lambda step, params, extra: extra
    """What `TrainState.extra` is before each step: an on-policy source puts its rollout there,
    where it is a part of checkpoints;"""
    extra: Mapping[str, Any] = MappingProxyType({})
    """and shapes of that, with shardings."""


class NonFiniteLoss(Exception):
    """Training has skipped too many steps in a row; the message names the tensor at fault."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs; a stage puts it together."""

    steps: int
    step_function: TrainStep
    """The jitted train step; it donates the state."""
    frozen: Params
    """Parameters that are not trained,"""
    kept: Params
    """and those of them that checkpoints hold."""
    stream: Stream
    complete: Complete
    """Of the objective."""
    evaluate: Callable[[int, TrainState], dict[str, float]]
    """Scores of the state after this many steps. `eval/loss` decides which checkpoint is best, or,
    where there is none, the highest `eval/reward`."""
    diagnose: Callable[[int, TrainState, Batch], str]
    """Names the first tensor that was not finite in the update that made this many steps."""
    recorder: Recorder
    ledger: Ledger
    """Where the time goes; it has been told which step the state is of."""
    watchdog: Watchdog
    checkpointer: Checkpointer
    log: LogConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    max_skipped: int
    """Steps in a row that may be skipped."""
    flops_per_token: float
    peak_flops: float | None
    """Of all devices together; None where it is not known."""


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
        ReplicasDiffer: copies of a parameter differ, where `run.checkpoint.check_replicas`.
    """
    with deferred_stop() as stop, ProgressLine("step") as progress:
        loop = _Loop(run, progress)
        start = int(state.step)
        loop.evaluate_if_missing(start, state)
        for step in range(start, run.steps):
            state = loop.prepared(step, state)
            batch = run.complete(state.params, run.frozen, loop.next_batch(step, state))
            state, metrics = run.step_function(state, run.frozen, batch)
            loop.finish_previous(state)
            loop.sent(step + 1, metrics, batch)
            # Asked once: a signal that comes at a later line is heeded a step later.
            stopping = stop.after(step + 1)
            due = step + 1 == run.steps or (step + 1) % run.checkpoint.every == 0
            if due or stopping or loop.save_again():
                loop.save(step + 1, state)
            if stopping:
                raise loop.preempted(step + 1, state, stop)
            if step + 1 == run.steps or (step + 1) % run.eval.every == 0:
                loop.evaluate(step + 1, state)
        with run.ledger.spending("checkpoint"):
            if not run.checkpointer.finish(run.steps, lambda: loop.save(run.steps, state)):
                raise Preempted(
                    f"checkpoint {run.steps}, the last, could not be written; "
                    "run the same command again"
                )
        if stop.signal:
            raise loop.preempted(run.steps, state, stop)
        return state, loop.measured()


class _Loop:
    """What the loop remembers between steps: the step under way, and the clock."""

    def __init__(self, run: Run, progress: ProgressLine) -> None:
        self._run = run
        self._progress = progress
        self._begin = time.monotonic()
        self._pending: tuple[int, StepMetrics, Batch] | None = None
        self._clock = _Clock(run.ledger)
        self._reward: float | None = None

    def prepared(self, step: int, state: TrainState) -> TrainState:
        params = trees.merge(state.params, self._run.frozen)
        extra = self._run.stream.prepare(step, params, state.extra)
        return dataclasses.replace(state, extra=extra)

    def next_batch(self, step: int, state: TrainState) -> Batch:
        with self._run.ledger.spending("data_wait"):
            return self._run.stream.source(step, state)

    def sent(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        self._pending = (step, metrics, batch)

    def finish_previous(self, state: TrainState) -> None:
        """Reads the metrics of the step sent before, logs them, and stops a run that diverged."""
        if self._pending is None:
            return
        step, on_device, batch = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._run.ledger.finished(step)
        self._clock.step(metrics["tokens"])
        self._run.watchdog.finished(step)
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
        is_point = step == 1 or step % run.log.every == 0 or step == run.steps
        told = run.stream.scalars(step) if is_point else {}
        self._reward = told.get("rollout/reward", self._reward)
        self._progress.update(
            step,
            run.steps,
            training_fields(metrics["loss"], metrics["learning_rate"], speed, mfu, self._reward),
        )
        if is_point:
            metrics.pop("tokens")
            scalars = {n if "/" in n else f"train/{n}": value for n, value in metrics.items()}
            scalars["train/tokens_per_second"] = speed
            scalars["train/data_wait_share"] = self._clock.wait_share()
            if mfu is not None:
                scalars["train/mfu"] = mfu
            scalars |= run.ledger.log_scalars()
            scalars |= told
            run.recorder.record(step, self._seconds(), scalars)
            run.ledger.tick()

    def save_again(self) -> bool:
        """Whether a save has failed and is due again."""
        with self._run.ledger.spending("checkpoint"):
            self._run.checkpointer.poll()
        return self._run.checkpointer.retry_due

    def save(self, step: int, state: TrainState) -> None:
        self.finish_previous(state)  # a run that goes on from here has its line
        run = self._run
        with run.ledger.spending("checkpoint"):
            if run.checkpoint.check_replicas:
                check_replicas(trees.merge(state.params, run.frozen))
                check_replicas(state.average or {})
            run.recorder.flush()
            run.checkpointer.save(step, *checkpoint_items(state, run.kept))
            run.ledger.write()
        self._run.watchdog.finished(step)

    def preempted(self, step: int, state: TrainState, stop: StopRequest) -> Preempted:
        """What to raise when a signal ends the run after `step`."""
        with self._run.ledger.spending("checkpoint"):
            saved = self._run.checkpointer.finish(
                step, lambda: self.save(step, state), stopping=True
            )
        self._run.ledger.write()
        return Preempted(
            f"stopped by {stop.signal} after step {step}, "
            f"which {'is' if saved else 'could not be'} saved; run the same command again to go on",
            together=True,
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        self.finish_previous(state)
        with self._run.ledger.spending("evaluation"):
            scores = self._run.evaluate(step, state)
            self._run.recorder.record(step, self._seconds(), scores)
            self._progress.message(
                f"step {step}: "
                + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            )
            self._mark_best()
        self._run.ledger.tick()
        self._run.watchdog.finished(step)

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
            found = line["eval/loss"] if "eval/loss" in line else -line["eval/reward"]
            return found if math.isfinite(found) else math.inf

        measured = ("eval/loss", "eval/reward")
        history = self._run.recorder.history()
        lines = [line for line in history if any(name in line for name in measured)]
        return [line["step"] for line in sorted(lines, key=loss)]

    def measured(self) -> dict[str, float]:
        return self._clock.measured() | {"train/steps": float(self._run.steps)}

    def _seconds(self) -> float:
        return time.monotonic() - self._begin


def checkpoint_items(state: TrainState, kept: Params) -> tuple[Any, Mapping[str, Any]]:
    """The state as a checkpoint holds it: `params`, which later stages read, and the rest.

    `params` are the trained parameters and `kept`, the others that are to be found again; those
    that are averaged as their average, and themselves in the rest.
    """
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    average = rest.pop("average")
    given_on = rest.pop("params") if average is None else average
    return trees.merge(given_on, kept), rest


def state_of(
    params: Params, rest: Mapping[str, Any], trainable: str
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the parameters kept beside it, of a checkpoint's items.

    The inverse of `checkpoint_items`; `trainable` is the pattern that the run splits them by.
    """
    trained, kept = trees.split(params, trainable)
    if "params" in rest:
        return TrainState(average=trained, **rest), kept
    return TrainState(params=trained, **rest), kept


class _Clock:
    """How fast steps are, without compilation, evaluation and checkpoints; and waiting for data."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._begin: tuple[float, float] | None = None
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=21)
        self._tokens = 0.0

    def step(self, tokens: float) -> None:
        """A step has ended; the first one, which compiles, only starts the clock."""
        if self._begin is None:
            self._begin = self._spent()
        else:
            self._tokens += tokens
        self._recent.append((sum(self._spent()), self._tokens))

    def tokens_per_second(self) -> float:
        """Over the last steps."""
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    def wait_share(self) -> float:
        """Share of all step time that was spent waiting for data."""
        seconds, waited = self._since_begin()
        return waited / seconds if seconds else 0.0

    def measured(self) -> dict[str, float]:
        seconds, _ = self._since_begin()
        if not self._tokens:
            return {}
        return {
            "train/tokens_per_second": self._tokens / seconds,
            "train/data_wait_share": self.wait_share(),
            "time/compile": self._ledger.spent("compile"),
            "time/train": seconds,
        }

    def _spent(self) -> tuple[float, float]:
        """Seconds of steps and of waiting, since the life began."""
        return self._ledger.spent("step"), self._ledger.spent("data_wait")

    def _since_begin(self) -> tuple[float, float]:
        """Seconds of steps with waiting, and of waiting alone, since the first step."""
        if self._begin is None:
            return 0.0, 0.0
        step, wait = (now - before for now, before in zip(self._spent(), self._begin, strict=True))
        return step + wait, wait
