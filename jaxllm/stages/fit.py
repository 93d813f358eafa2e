"""What every training stage does alike: state, restore, step function, loop."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from jaxllm import trees
from jaxllm.checkpoints.checkpointer import Checkpointer, committed_steps
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.planning.peaks import peak_flops
from jaxllm.reporting.goodput import Ledger
from jaxllm.sharding.mesh import batch_shards
from jaxllm.sharding.processes import is_main
from jaxllm.sharding.rules import Rules, with_shardings
from jaxllm.stages.fields import TrainingFields
from jaxllm.stages.trained import print_trained, trained_scores
from jaxllm.training.diagnose import first_non_finite
from jaxllm.training.learning_rates import check_factors, layer_factors, parse_factors
from jaxllm.training.loop import Run, Stream, checkpoint_items, state_of, train
from jaxllm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxllm.training.recorder import Recorder
from jaxllm.training.state import TrainState
from jaxllm.training.step import (
    init_state,
    jit_step,
    make_train_step,
    row_keys,
    sparing_step,
    state_shapes,
)
from jaxllm.training.watchdog import Watchdog, waited_for

Evaluate = Callable[[int, TrainState, Params], dict[str, float]]


def check_batch(config: TrainingFields, mesh: Mesh) -> None:
    """Checks, before anything slow, that the mesh can divide the batch.

    Raises:
        UserError: it cannot.
    """
    shards = batch_shards(mesh)
    rows = config.batch_size // config.micro_batches
    if rows % shards:
        field = "micro_batch_size" if config.micro_batches > 1 else "batch_size"
        raise UserError(
            f"config.{field}: {rows} rows cannot be divided over the {shards} devices along the "
            f"mesh's data, fsdp and expert axes; make it a multiple of {shards}."
        )


def check_patterns(config: TrainingFields, param_shapes: Params) -> None:
    """Checks, before anything slow, that every pattern over parameters matches one.

    Raises:
        UserError: one does not.
    """
    trainable = check_trained(config, param_shapes, config.trained)
    check_factors(parse_factors(config.optimizer.learning_rates), trainable)


def check_trained(config: TrainingFields, param_shapes: Params, pattern: str) -> Params:
    """The parameters that `pattern` matches, which comes of `train.trainable`.

    Raises:
        UserError: there are none.
    """
    try:
        return trees.split(param_shapes, pattern)[0]
    except UserError as error:
        told = str(error).replace(repr(pattern), repr(config.train.trainable))
        raise UserError(f"config.train.trainable: {told}") from None


def is_finished(config: TrainingFields, run: RunDirectory) -> bool:
    """Whether the run directory holds a run that has made its steps and told its scores."""
    if not run.report.exists() or run.final_scores().get("train/steps") != config.steps:
        return False
    return max(committed_steps(run.checkpoints), default=-1) >= config.steps


def fit(
    config: TrainingFields,
    run: RunDirectory,
    mesh: Mesh,
    *,
    objective: Objective,
    initial_params: Callable[[], dict[str, Any]],
    base_params: Callable[[], dict[str, Any]] | None = None,
    param_shapes: Params,
    rules: Rules,
    stream: Stream,
    evaluate: Evaluate,
    ledger: Ledger,
    flops_per_token: float,
) -> tuple[TrainState, Params, dict[str, float]]:
    """Trains to the end, from the newest checkpoint of the run if it has one.

    Args:
        config: the fields that every training stage has.
        run: where checkpoints and metrics go.
        mesh: the devices; `jax.set_mesh` has been done.
        objective: what is minimised.
        initial_params: makes the parameters that training begins from, laid out over the mesh.
        base_params: makes, in later lives, those of them that are in no checkpoint (`config.kept`),
            if there are any; None: `initial_params` does.
        param_shapes: their shapes.
        rules: how parameters lie on the mesh.
        stream: batches, and what the algorithm remembers.
        evaluate: `(step, state, frozen) -> scores`.
        ledger: where the time goes; afterwards what is in no block counts as evaluation.
        flops_per_token: for MFU.

    Returns:
        The last state, the parameters that were not trained, and what the loop measured.
    """
    optimizer = make_optimizer(config.optimizer)
    shapes = with_shardings(param_shapes, rules, mesh)
    trainable_shapes, frozen_shapes = trees.split(shapes, config.trained)
    kept_shapes, base_shapes = trees.divide(frozen_shapes, config.kept)
    averaged = config.train.ema > 0
    state_layout = state_shapes(trainable_shapes, optimizer, rules, mesh, averaged, stream.extra)
    if is_main():
        print_trained(param_shapes, config.trained, state_layout.opt_state)
    peak = config.log.peak_tflops * 1e12 or peak_flops(mesh.devices.flat[0].device_kind)
    with contextlib.ExitStack() as stack:
        watchdog = Watchdog(config.log.watchdog, lambda: waited_for(ledger.category))
        stack.enter_context(watchdog)
        checkpointer = Checkpointer(run.checkpoints, config.checkpoint.keep)
        stack.enter_context(contextlib.closing(checkpointer))
        with ledger.spending("restore"):
            restored = _restored(config, checkpointer, state_layout, kept_shapes)
        state, kept, base = _begun(
            config,
            restored,
            initial_params if restored is None else base_params or initial_params,
            bool(base_shapes),
            lambda trainable: init_state(trainable, optimizer, state_layout),
        )
        frozen = trees.merge(kept, base)
        ledger.resumed(int(state.step))
        recorder = Recorder(run, int(state.step), config.log, dataclasses.asdict(config))
        stack.enter_context(contextlib.closing(recorder))
        loop = Run(
            steps=config.steps,
            step_function=_step_function(
                config, objective, optimizer, state_layout, param_shapes, mesh
            ),
            frozen=frozen,
            kept=kept,
            stream=stream,
            complete=objective.complete,
            evaluate=lambda step, state: evaluate(step, state, frozen),
            diagnose=_diagnosis(config, objective, frozen),
            recorder=recorder,
            ledger=ledger,
            watchdog=watchdog,
            checkpointer=checkpointer,
            log=config.log,
            eval=config.eval,
            checkpoint=config.checkpoint,
            max_skipped=config.train.max_skipped,
            flops_per_token=flops_per_token,
            peak_flops=peak * mesh.size if peak else None,
        )
        state, measured = train(loop, state)
        ledger.otherwise("evaluation")
    measured |= trained_scores(param_shapes, config.trained, state_layout.opt_state)
    return state, frozen, measured


def _begun(
    config: TrainingFields,
    restored: tuple[TrainState, dict[str, Any]] | None,
    make_params: Callable[[], dict[str, Any]],
    has_base: bool,
    new: Callable[[dict[str, Any]], TrainState],
) -> tuple[TrainState, dict[str, Any], Params]:
    """The state to go on from, and the parameters not trained: those that checkpoints hold, and
    those of the base.

    Args:
        config: of the stage.
        restored: of a checkpoint.
        make_params: makes those that training begins from, or that are not restored.
        has_base: whether some are not restored.
        new: makes the state of trained parameters before the first step.
    """
    if restored and not has_base:
        return *restored, {}
    trainable, rest = trees.divide(make_params(), config.trained)
    kept, base = trees.divide(rest, config.kept)
    state, kept = restored or (new(trainable), kept)
    return state, kept, base


def _step_function(
    config: TrainingFields,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    layout: TrainState,
    param_shapes: Params,
    mesh: Mesh,
) -> Any:
    """The jitted train step."""
    step = make_train_step(
        objective,
        optimizer,
        learning_rate_schedule(config.optimizer, config.steps),
        micro_batches=config.micro_batches,
        seed=config.seed,
        factors=parse_factors(config.optimizer.learning_rates),
        by_layer=layer_factors(config.optimizer.layer_decay, param_shapes),
        ema=config.train.ema,
    )
    return sparing_step(jit_step(step, layout, mesh))


def _diagnosis(
    config: TrainingFields, objective: Objective, frozen: Params
) -> Callable[[int, TrainState, Batch], str]:
    """What names the first tensor of a step that is not finite."""

    def diagnose(step: int, state: TrainState, batch: Batch) -> str:
        keys = row_keys(config.seed, step - 1, config.batch_size)
        return first_non_finite(objective, state.params, frozen, batch, keys)

    return diagnose


def _restored(
    config: TrainingFields, checkpointer: Checkpointer, layout: TrainState, kept_shapes: Params
) -> tuple[TrainState, dict[str, Any]] | None:
    """The state of the newest checkpoint and the parameters not trained that it holds, if there is
    one."""
    restored = checkpointer.restore(*checkpoint_items(layout, kept_shapes))
    if restored is None:
        return None
    step, params, progress = restored
    if step > config.steps:
        raise UserError(
            f"config.steps: the run has already made {step:,} steps; give at least as many."
        )
    print(f"going on from step {step:,} of {config.steps:,}", file=sys.stderr)
    return state_of(params, progress, config.trained)
