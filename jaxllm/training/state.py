"""The state that a step transforms and a checkpoint holds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

# An int32 scalar. Not annotated as an array: the same class also holds what describes a state,
# the shapes and the shardings of its arrays.
Counter = Any
# A tree as `params`, or None, in whose place `jax.jit` puts markers of its own.
Average = Any


@flax.struct.dataclass
class TrainState:
    """Everything that training remembers from step to step."""

    step: Counter
    """Optimizer updates sent so far, skipped ones included: the index of the next batch."""
    params: dict[str, Any]
    """The trainable subtree of the parameters, in the dtype that the model stores them in."""
    opt_state: Any
    """The optimizer's state, for the trainable subtree alone."""
    skipped: Counter
    """Steps whose loss or gradient was not finite, and which changed no parameter."""
    skipped_in_a_row: Counter
    """How many of them since the last finite step."""
    extra: Mapping[str, Any]
    """What an algorithm remembers beside the parameters: a KL coefficient, or the rollout that it
    is learning from."""
    average: Average = None
    """The moving average of `params`, float32; None where the run keeps none."""

    @property
    def evaluation_params(self) -> dict[str, Any]:
        """The trainable subtree as evaluation and later stages have it: averaged, if there is an
        average, and in the dtype that the model stores it in."""
        if self.average is None:
            return self.params
        return jax.tree.map(lambda a, p: a.astype(p.dtype), self.average, self.params)


def new_state(
    params: dict[str, Any],
    opt_state: Any,
    averaged: bool = False,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> TrainState:
    """The state before the first step.

    Args:
        params: those that are trained.
        opt_state: of the optimizer.
        averaged: whether there is a moving average of the parameters.
        extra: shapes of what an algorithm remembers, which is 0 as yet.
    """
    zero = jnp.zeros((), jnp.int32)
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), dict(extra))
    average = optax.tree.cast(params, jnp.float32) if averaged else None
    return TrainState(zero, params, opt_state, zero, zero, nothing, average)
