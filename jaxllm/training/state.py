"""The state that a step transforms and a checkpoint holds."""

from typing import Any

import flax.struct
import jax

# An int32 scalar. Not annotated as an array: the same class also holds what describes a state,
# the shapes and the shardings of its arrays.
Counter = Any


@flax.struct.dataclass
class TrainState:
    """Everything that training remembers from step to step."""

    step: Counter
    """Optimizer updates sent so far, skipped ones included: the index of the next batch."""
    params: dict[str, Any]
    """The trainable subtree of the parameters, float32."""
    opt_state: Any
    """The optimizer's state, for the trainable subtree alone."""
    skipped: Counter
    """Steps whose loss or gradient was not finite, and which changed no parameter."""
    skipped_in_a_row: Counter
    """How many of them since the last finite step."""
    extra: dict[str, Any]
    """What an algorithm remembers beside the parameters (a KL coefficient, say)."""


def new_state(params: dict[str, Any], opt_state: Any) -> TrainState:
    """The state before the first step."""
    zero = jax.numpy.zeros((), jax.numpy.int32)
    return TrainState(zero, params, opt_state, zero, zero, {})
