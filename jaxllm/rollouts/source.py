"""Rollouts as a source of the one training loop: drawn by the current parameters, learnt from for
so many updates, and a part of checkpoints as long as they are.

Rollout k is a function of (parameters, seed, k); so a run that goes on in the middle of one has it
from its checkpoint, and draws the next as it would have.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int64

from jaxllm import trees
from jaxllm.data.permutation import Permutation
from jaxllm.data.prompts import Prompt
from jaxllm.objectives.objective import Batch, Memory, Params
from jaxllm.objectives.policy_gradient import GOING_ON
from jaxllm.rollouts.advantages import adapted_kl_coefficient
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.judging import Judged
from jaxllm.rollouts.learner import Learner
from jaxllm.rollouts.responses import INTEGERS, Response, bucket, on_devices, rows_of
from jaxllm.sharding.mesh import batch_sharding

ROLLOUT = "rollout"
KL_COEF = "kl_coef"
TOLD = "told"
"""Names of what an algorithm remembers beside `GOING_ON`: arrays of the rollout, β, and what is
told of the rollout."""

_KEPT = (*INTEGERS, "loss_weights", "sampler_log_probs")

Scalars = dict[str, Float[Array, ""]]


@runtime_checkable
class Estimator(Protocol):
    """What is to be learnt from a rollout."""

    @property
    def name(self) -> str:
        """Of the algorithm, before the names of what is told."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that `__call__` adds to rows."""
        ...

    @property
    def told(self) -> tuple[str, ...]:
        """Names of what `__call__` tells."""
        ...

    def __call__(
        self,
        rows: Batch,
        scores: Float[Array, " rows"],
        ended: Bool[Array, " rows"],
        kl_coef: Float[Array, ""],
    ) -> tuple[Batch, Scalars]:
        """The rows with `advantages` and what else the objective asks for, without those that
        there is nothing to learn from; and what is to be told of them.

        Args:
            rows: with what `Learner.measure` gives.
            scores: what each response is worth.
            ended: whether it has an end.
            kl_coef: β.
        """
        ...


@runtime_checkable
class Writes(Protocol):
    """What has responses to prompts; `Writer` is one."""

    def rollout(
        self, params: Params, number: int, rows: int, seed: int
    ) -> tuple[list[Prompt], list[Response]]: ...


@runtime_checkable
class Judges(Protocol):
    """What says what responses are worth; `Judge` is one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards; none: there are none."""
        ...

    def __call__(self, asked: Sequence[Prompt], written: Sequence[Response]) -> Judged: ...


class Rollouts:
    """The rollouts of a run, as the loop asks for them; its mesh must be set."""

    def __init__(
        self,
        config: RolloutConfig,
        writer: Writes,
        judge: Judges,
        learner: Learner,
        estimator: Estimator,
        *,
        mesh: Mesh,
        batch_size: int,
        parts: int,
        places: int,
        seed: int,
        writing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Args:
        config: how responses are drawn.
        writer: what draws them.
        judge: what they are worth.
        learner: the models that learn from them.
        estimator: what is to be learnt.
        mesh: the devices.
        batch_size: responses of an update.
        parts: into how many parts an update's responses are cut.
        places: of a row.
        seed: of all that is drawn.
        writing: entered as long as responses are written and judged.
        """
        self._config, self._writer, self._judge = config, writer, judge
        self._learner, self._estimator = learner, estimator
        self._places, self._batch_size, self._seed = places, batch_size, seed
        self._writing = writing
        self._rows, self._parts = batch_size * config.minibatches, parts * config.minibatches
        self._names = (*_KEPT, *estimator.names)
        self._by_row = batch_sharding(mesh)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._told: dict[int, dict[str, float]] = {}
        self._length = 0
        self._learnt = jax.jit(
            self._remembered,
            static_argnames="length",
            out_shardings=jax.tree.map(lambda shape: shape.sharding, self.memory),
        )
        # Whole in every process.
        self._used = jax.jit(
            lambda segments: jnp.any(segments > 0, axis=0, keepdims=True),
            out_shardings=self._everywhere,
        )
        self._part = jax.jit(
            _part, static_argnames="length", out_shardings=dict.fromkeys(self._names, self._by_row)
        )

    @property
    def memory(self) -> dict[str, Any]:
        """Shapes of what is remembered, with how they lie on the mesh."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._everywhere)
        rollout = {
            name: jax.ShapeDtypeStruct(
                (self._rows, self._places),
                jnp.int32 if name in INTEGERS else jnp.float32,
                sharding=self._by_row,
            )
            for name in self._names
        }
        names = self._judge.names
        of_rewards = {"reward": scalar, "rewards": dict.fromkeys(names, scalar)} if names else {}
        told = {
            ROLLOUT: dict.fromkeys(_OF_RESPONSES, scalar) | of_rewards,
            self._estimator.name: dict.fromkeys(self._estimator.told, scalar),
        }
        return {ROLLOUT: rollout, GOING_ON: scalar, KL_COEF: scalar, TOLD: told}

    def prepare(self, step: int, params: Params, memory: Memory) -> Memory:
        """What is remembered when the update after `step` others begins: with a new rollout by
        these parameters, if one is due.

        Raises:
            UserError: a reward fails.
        """
        number, update = divmod(step, self._config.updates)
        if update:
            if not self._length:  # it is of an earlier life
                used = self._used(memory[ROLLOUT]["segment_ids"])
                self._length = bucket({"segment_ids": np.asarray(used)})
                self._told = {number: _scalars(memory)}
            return memory
        jax.block_until_ready(params)  # of the update before, whose time is not that of writing
        with self._writing():
            asked, written = self._writer.rollout(params, number, self._rows, self._seed)
            judged = self._judge(asked, written)
        rows = rows_of(asked, written, self._places)
        self._length = bucket(rows)
        memory = self._learnt(
            params,
            on_devices(rows, self._by_row),
            judged.scores.astype(np.float32),
            np.array([response.ended for response in written]),
            memory[KL_COEF],
            np.bool_(step == 0),
            _of_responses(written, judged),
            length=self._length,
        )
        # A step is told of when the next one has been sent, which may have a rollout of its own.
        self._told = {number - 1: self._told.get(number - 1, {}), number: _scalars(memory)}
        return memory

    def __call__(self, step: int, state: Any) -> Batch:
        """The responses that an update learns from, of `state.extra`."""
        number, update = divmod(step, self._config.updates)
        epoch, part = divmod(update, self._config.minibatches)
        order = self._order(number, epoch)[part * self._batch_size : (part + 1) * self._batch_size]
        return self._part(state.extra, order, length=self._length)

    def scalars(self, step: int) -> Mapping[str, float]:
        """What is told of the rollout that the update after `step - 1` others has learnt from."""
        return self._told[(step - 1) // self._config.updates]

    def _remembered(
        self,
        params: Params,
        rows: Batch,
        scores: Float[Array, " rows"],
        ended: Bool[Array, " rows"],
        kl_coef: Float[Array, ""],
        is_first: Bool[Array, ""],
        told: Mapping[str, Any],
        length: int,
    ) -> Memory:
        """What is remembered of responses, of which `length` places are used."""
        kl_coef = jnp.where(is_first, self._config.kl_coef, kl_coef)
        measured = self._learner.measure(params, rows, self._parts, length)
        found, more = self._estimator({**rows, **measured}, scores, ended, kl_coef)
        config = self._config
        if config.kl_target:
            kl_coef = adapted_kl_coefficient(
                kl_coef, more["kl"], len(scores), config.kl_target, config.kl_horizon
            )
        return {
            ROLLOUT: {name: found[name] for name in self._names},
            GOING_ON: jnp.ones((), jnp.float32),
            KL_COEF: kl_coef,
            TOLD: {ROLLOUT: told, self._estimator.name: more},
        }

    def _order(self, number: int, epoch: int) -> Int64[np.ndarray, " rows"]:
        """In which order an epoch goes through the rows; as they are, where it has one part."""
        if self._config.minibatches == 1:
            return np.arange(self._rows)
        order = Permutation(self._rows, f"{self._seed} rollout {number} {epoch}")
        return np.array([order(row) for row in range(self._rows)])


_OF_RESPONSES = ("length", "eos_rate")


def _of_responses(written: Sequence[Response], judged: Judged) -> dict[str, Any]:
    """What is told of responses themselves: means."""
    values = {
        "length": [len(response.ids) for response in written],
        "eos_rate": [response.ended for response in written],
    }
    if judged.by_name:
        values |= {"reward": judged.scores, "rewards": judged.by_name}
    return trees.map_with_paths(lambda _, each: np.asarray(np.mean(each), np.float32), values)


def _part(memory: Memory, order: Int[Array, " part"], length: int) -> Batch:
    """Some rows of a rollout; nothing is learnt from them once its updates are cut short."""
    rows = {name: array[order, :length] for name, array in memory[ROLLOUT].items()}
    weights = [name for name in rows if name.endswith("_weights")]
    return rows | {name: rows[name] * memory[GOING_ON] for name in weights}


def _scalars(memory: Memory) -> dict[str, float]:
    """What is told of a rollout, by the names of metrics."""
    return {
        path: float(value) for path, value in trees.leaves_with_paths(jax.device_get(memory[TOLD]))
    }
