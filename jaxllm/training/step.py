"""The train step: exact gradient accumulation, the update, and the guard against NaN."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxllm.host_memory import allocated_bytes, give_back_freed_memory, wait_until_freed
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.sharding.mesh import batch_sharding, in_micro_batches
from jaxllm.sharding.rules import Rules, shardings, with_sharding
from jaxllm.training.learning_rates import Factors, LayerFactors, factor_tree
from jaxllm.training.moments import moment_shardings
from jaxllm.training.rounding import stochastic_round
from jaxllm.training.state import TrainState, new_state

StepMetrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]

# Folded into the key of a step where rows fold in their index: no batch has that many.
_ROUNDING = 2**32 - 1

# Temporaries, in bytes, of which a second place is not worth the moment that a step waits for the
# first: one with as many takes a hundred milliseconds at the least.
_LARGE = 64 * 2**20


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    seed: int,
    factors: Factors = (),
    by_layer: LayerFactors | None = None,
    ema: float = 0.0,
) -> TrainStep:
    """The pure function `(state, frozen, batch) -> (state, metrics)`; jit it with `jit_step`.

    Gradients are those of Σₜ coefficientₜ · sumₜ / weightₜ over the whole batch, whatever the
    number of micro-batches. A step whose loss or gradient norm is not finite changes nothing
    but the counters, and one with nothing to learn, whose `loss_weights` or gradients are all 0,
    nothing but the number of steps. Metrics are float32 scalars: `objective`, those of the
    objective, `grad_norm` (before clipping), `learning_rate`, `tokens` (not padding), `skipped`
    and `skipped_in_a_row`.

    Args:
        objective: what is minimised.
        optimizer: gradients to directions, of `make_optimizer`.
        schedule: the learning rate by step.
        micro_batches: into how many parts a batch is cut.
        seed: of what rows draw, and of the rounding of what is stored in bfloat16.
        factors: of the learning rate, by path.
        by_layer: more of them, from `layer_factors`.
        ema: decay of the moving average of parameters; 0: the state holds none.
    """

    def train_step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        keys = row_keys(seed, state.step, len(batch["segment_ids"]))
        loss, gradients, metrics = loss_and_gradients(
            objective, state.params, frozen, batch, keys, micro_batches
        )
        grad_norm = optax.tree.norm(gradients)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        rates = jax.tree.map(
            lambda f: learning_rate * f, factor_tree(factors, state.params, by_layer)
        )
        updated, direction_norm = _updated(state, optimizer, gradients, rates, ema, seed)

        # The directions too: an optimizer can divide by zero where gradients are finite.
        finite = jnp.isfinite(loss + grad_norm + direction_norm)
        # Moments and decay would move the parameters, though there is no gradient.
        learnt = grad_norm != 0
        if (
            "loss_weights" in batch
        ):  # terms that ask for none, as a router's, are not to learn alone
            learnt &= jnp.any(batch["loss_weights"] != 0)
        updated = dataclasses.replace(updated, extra=objective.remember(state.extra, metrics))
        state = jax.tree.map(lambda new, old: jnp.where(finite & learnt, new, old), updated, state)
        skipped = 1 - finite.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        return state, metrics | {
            "objective": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32),
            "skipped": state.skipped.astype(jnp.float32),
            "skipped_in_a_row": state.skipped_in_a_row.astype(jnp.float32),
        }

    return train_step


def row_keys(seed: int, step: int | Int[Array, ""], rows: int) -> Key[Array, " rows"]:
    """The key of each row of the global batch at a step: what a row may draw from."""
    return jax.vmap(jax.random.fold_in, (None, 0))(_step_key(seed, step), jnp.arange(rows))


def loss_and_gradients(
    objective: Objective,
    params: Params,
    frozen: Params,
    batch: Batch,
    row_keys: RowKeys,
    micro_batches: int,
) -> tuple[Float[Array, ""], Any, StepMetrics]:
    """The loss of the whole batch, its gradient (float32), and the objective's metrics.

    The weights are totalled over the batch first; each micro-batch then contributes the
    gradient of its sums over those totals, so accumulation is exact (unlike a mean of means).
    `row_keys` holds a key for each row, which it takes into its micro-batch; None: nothing is
    drawn.
    """
    totals = objective.weights(batch)

    def partial_loss(
        params: Params, rows: Batch, row_keys: RowKeys
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Metrics]]:
        sums, metrics = objective.sums(params, rows, frozen, row_keys)
        loss = weighted_loss(objective, sums, totals)
        return loss, (loss, metrics)

    def gradient(params: Params, rows: Batch, row_keys: RowKeys) -> Any:
        gradients, measured = jax.grad(partial_loss, has_aux=True)(params, rows, row_keys)
        # Of parameters in bfloat16 too: many small ones are to be added up.
        return optax.tree.cast(gradients, jnp.float32), measured

    if micro_batches == 1:
        gradients, (loss, metrics) = gradient(params, batch, row_keys)
    else:
        # The sums over micro-batches start from zeros of the right shapes.
        parts = jax.tree.map(lambda a: in_micro_batches(a, micro_batches), (dict(batch), row_keys))
        first = jax.tree.map(lambda part: part[0], parts)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, params, *first),
        )

        def accumulate(total: Any, part: tuple[Batch, RowKeys]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        (gradients, (loss, metrics)), _ = jax.lax.scan(accumulate, zeros, parts)
    means = {name: _ratio(total, weight) for name, (total, weight) in metrics.items()}
    return loss, gradients, means


def weighted_loss(objective: Objective, sums: Sums, totals: Sums) -> Float[Array, ""]:
    """Σₜ coefficientₜ · sumₜ / totalₜ; a term of weight 0 counts nothing."""
    terms = (
        coefficient * _ratio(sums[term], totals[term])
        for term, coefficient in objective.coefficients.items()
    )
    return sum(terms, jnp.zeros((), jnp.float32))


def jit_step(train_step: TrainStep, shapes: TrainState, mesh: Mesh) -> Any:
    """Jits a train step over a mesh: the state is laid out as `shapes` says, and is donated."""
    state_shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, None, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


def sparing_step(jitted: Any) -> TrainStep:
    """A step of `jit_step` that holds no more of the host's memory than one step needs.

    What compiling took is given back before the first step takes its temporaries; else a CPU would
    hold both to the end of the run (`host_memory.py`). On a CPU a step with large temporaries also
    begins only when those of the step before are free, which XLA frees a moment after it has handed
    out the results; else it would take a second place of that size, or a third. The caller's own
    work between steps goes on meanwhile, as elsewhere.
    """
    temporary: int | None = None
    held = 0  # before the last step took its temporaries

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        nonlocal temporary, held
        if temporary is None:
            program = jitted.lower(state, frozen, batch).compile()  # remembered by `jitted`
            give_back_freed_memory()
            temporary = _temporary_bytes(program) if jax.default_backend() == "cpu" else 0
            held = allocated_bytes()
        elif temporary >= _LARGE:
            jax.block_until_ready(state.step)
            held = wait_until_freed(held + temporary // 2)
        return jitted(state, frozen, batch)

    return step


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    """Bytes of what a program makes for itself while it runs; 0 where the backend does not tell."""
    return getattr(program.memory_analysis(), "temp_size_in_bytes", 0)


def state_shapes(
    param_shapes: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    rules: Rules,
    mesh: Mesh,
    averaged: bool = False,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> TrainState:
    """The train state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

    The optimizer's moments and the moving average, if the state is to hold one, lie as their
    parameters do, `extra` as its own shapes say, counters on every device.
    """
    by_param = shardings(param_shapes, rules, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, param_shapes)
    shapes = jax.eval_shape(
        lambda params, opt_state: new_state(params, opt_state, averaged, extra),
        param_shapes,
        opt_shapes,
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    layout = dataclasses.replace(
        jax.tree.map(lambda _: replicated, shapes),
        params=by_param,
        opt_state=moment_shardings(opt_shapes, param_shapes, by_param, mesh),
        average=by_param if averaged else None,
        extra=jax.tree.map(lambda shape: shape.sharding, dict(extra)),
    )
    return jax.tree.map(with_sharding, shapes, layout)


def init_state(
    params: dict[str, Any],
    optimizer: optax.GradientTransformationExtraArgs,
    shapes: TrainState,
) -> TrainState:
    """The state before the first step, laid out as `shapes` says; `params` are donated."""
    make = jax.jit(
        lambda params: new_state(
            params, optimizer.init(params), shapes.average is not None, shapes.extra
        ),
        out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes),
        donate_argnums=0,
    )
    return make(params)


def _updated(
    state: TrainState,
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: Any,
    rates: Any,
    ema: float,
    seed: int,
) -> tuple[TrainState, Float[Array, ""]]:
    """The state with parameters, moments and average moved on, and the norm of the directions.

    All is computed in float32. What the state holds in bfloat16 is rounded by chance, since an
    update is often smaller than half the step from one bfloat16 number to the next.
    """
    key = jax.random.fold_in(_step_key(seed, state.step), _ROUNDING)
    moments_key, params_key = (jax.random.fold_in(key, index) for index in range(2))
    params = optax.tree.cast(state.params, jnp.float32)
    directions, opt_state = optimizer.update(gradients, state.opt_state, params, key=moments_key)
    params = jax.tree.map(lambda p, d, rate: p - rate * d, params, directions, rates)
    params = stochastic_round(params, state.params, params_key)
    average = state.average
    if ema:
        updates = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(ema, (1 + updates) / (10 + updates))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
    updated = dataclasses.replace(state, params=params, opt_state=opt_state, average=average)
    return updated, optax.tree.norm(directions)


def _step_key(seed: int, step: int | Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), step)


def _ratio(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    # Not `weight > 0`: a weight that is NaN has to show.
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))
