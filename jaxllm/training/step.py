"""The train step: exact gradient accumulation, the update, and the guard against NaN."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxllm import trees
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, Sums
from jaxllm.sharding.mesh import BATCH_AXES, batch_sharding, constrain
from jaxllm.sharding.rules import Rules, shardings, with_sharding
from jaxllm.training.state import TrainState, new_state

StepMetrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    seed: int,
) -> TrainStep:
    """The pure function `(state, frozen, batch) -> (state, metrics)`; jit it with `jit_step`.

    Gradients are those of Σₜ coefficientₜ · sumₜ / weightₜ over the whole batch, whatever the
    number of micro-batches. A step whose loss or gradient norm is not finite changes nothing
    but the counters. Metrics are float32 scalars: `objective`, those of the objective,
    `grad_norm` (before clipping), `learning_rate`, `tokens` (not padding), `skipped` and
    `skipped_in_a_row`.
    """

    def train_step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, gradients, metrics = loss_and_gradients(
            objective, state.params, frozen, batch, rng, micro_batches
        )
        grad_norm = optax.tree.norm(gradients)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        directions, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, directions)

        # The directions too: an optimizer can divide by zero where gradients are finite.
        finite = jnp.isfinite(loss + grad_norm + optax.tree.norm(directions))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = 1 - finite.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
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


def loss_and_gradients(
    objective: Objective,
    params: Params,
    frozen: Params,
    batch: Batch,
    rng: Array,
    micro_batches: int,
) -> tuple[Float[Array, ""], Any, StepMetrics]:
    """The loss of the whole batch, its gradient, and the objective's metrics.

    The weights are totalled over the batch first; each micro-batch then contributes the
    gradient of its sums over those totals, so accumulation is exact (unlike a mean of means).
    """
    totals = objective.weights(batch)

    def partial_loss(
        params: Params, rows: Batch
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Metrics]]:
        sums, metrics = objective.sums(params, rows, frozen, rng)
        loss = weighted_loss(objective, sums, totals)
        return loss, (loss, metrics)

    gradient = jax.grad(partial_loss, has_aux=True)
    if micro_batches == 1:
        gradients, (loss, metrics) = gradient(params, batch)
    else:
        # The i-th micro-batch takes every micro_batches-th row, so that each device keeps its
        # own rows. The sums over micro-batches start from zeros of the right shapes.
        rows = {name: _interleave(array, micro_batches) for name, array in batch.items()}
        first = {name: array[0] for name, array in rows.items()}
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, params, first),
        )

        def accumulate(total: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, rows)), None

        (gradients, (loss, metrics)), _ = jax.lax.scan(accumulate, zeros, rows)
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


def state_shapes(
    param_shapes: Params, optimizer: optax.GradientTransformation, rules: Rules, mesh: Mesh
) -> TrainState:
    """The train state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

    The optimizer's moments lie as their parameters do, counters on every device.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    by_param = shardings(param_shapes, rules, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, param_shapes)
    by_path = dict(trees.leaves_with_paths(by_param))
    opt_shardings = jax.tree_util.tree_map_with_path(
        lambda keys, _: by_path[path] if (path := _parameter_path(keys)) else replicated,
        opt_shapes,
    )
    shapes = jax.eval_shape(new_state, param_shapes, opt_shapes)
    layout = jax.tree.map(lambda _: replicated, shapes)
    layout = dataclasses.replace(layout, params=by_param, opt_state=opt_shardings)
    return jax.tree.map(with_sharding, shapes, layout)


def init_state(
    params: dict[str, Any], optimizer: optax.GradientTransformation, shapes: TrainState
) -> TrainState:
    """The state before the first step, laid out as `shapes` says; `params` are donated."""
    make = jax.jit(
        lambda params: new_state(params, optimizer.init(params)),
        out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes),
        donate_argnums=0,
    )
    return make(params)


def _parameter_path(keys: tuple[Any, ...]) -> str:
    """The parameter that a leaf of the optimizer's state belongs to, by the dicts it lies in."""
    names = (key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
    return "/".join(names)


def _interleave(array: Array, parts: int) -> Array:
    """[batch, ...] -> [parts, batch / parts, ...], part i taking rows i, i + parts, ..."""
    split = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
    return constrain(jnp.moveaxis(split, 1, 0), None, BATCH_AXES)


def _ratio(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    # Not `weight > 0`: a weight that is NaN has to show.
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))
