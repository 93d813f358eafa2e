"""The state that a step transforms and a checkpoint holds."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax

# An int32 scalar. Not annotated as an array: the same class also holds what describes a state,
# the shapes and the shardings of its arrays.
Counter = Any


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
    extra: dict[str, Any]
    """What an algorithm remembers beside the parameters (a KL coefficient, say); `ema` is their
    moving average, float32, where the run keeps one."""

    @property
    def result(self) -> dict[str, Any]:
        """The trainable subtree as evaluation and later stages use it: averaged, if it is."""
        return self.extra.get("ema", self.params)


def new_state(params: dict[str, Any], opt_state: Any, averaged: bool = False) -> TrainState:
    """The state before the first step; `averaged`: with a moving average of the parameters."""
    zero = jnp.zeros((), jnp.int32)
    extra = {"ema": optax.tree.cast(params, jnp.float32)} if averaged else {}
    return TrainState(zero, params, opt_state, zero, zero, extra)
