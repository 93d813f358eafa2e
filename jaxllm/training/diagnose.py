"""Where a loss stopped being finite: the first parameter, layer or gradient that is not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.training.step import loss_and_gradients


def first_non_finite(
    objective: Objective, params: Params, frozen: Params, batch: Batch, rng: jax.Array
) -> str:
    """Names the first tensor at fault: of the parameters, else of the forward pass, else of the
    gradients; in the forward pass in the order of computation, with the layer's number.

    It runs the objective once more with every module's output watched, whatever the model.
    """
    everything = trees.merge(params, frozen)
    for path, leaf in trees.leaves_with_paths(everything):
        if place := _place(leaf):
            return f"the parameter {path}{place} is not finite"
    watched = _Watched()
    with nn.intercept_methods(watched.intercept):
        loss, gradients, _ = jax.jit(
            lambda params, batch: loss_and_gradients(objective, params, frozen, batch, rng, 1)
        )(params, batch)
        jax.block_until_ready(loss)
        jax.effects_barrier()
    if watched.first:
        return f"the output of {watched.first} is not finite"
    if not jnp.isfinite(loss):
        return "the hidden states are finite, but the loss is not"
    for path, leaf in trees.leaves_with_paths(gradients):
        if place := _place(leaf):
            return f"the gradient of {path}{place} is not finite"
    return "everything was finite when the step was run again"


class _Watched:
    """Notes the first module whose output is not finite."""

    def __init__(self) -> None:
        self.first = ""
        self._calls: Counter[str] = Counter()

    def intercept(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        output = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path:
            for leaf in jax.tree.leaves(output):
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    finite = jnp.all(jnp.isfinite(leaf))
                    jax.debug.callback(lambda ok, path=path: self._note(path, ok), finite)
        return output

    def _note(self, path: str, finite: Any) -> None:
        # A scanned layer is traced once and runs once for each repeat of its stack; the backward
        # pass is not watched, so calls count repeats.
        repeat = self._calls[path]
        self._calls[path] += 1
        if not finite and not self.first:
            self.first = f"{path} (repeat {repeat} of its stack)" if "stack_" in path else path


def _place(leaf: jax.Array) -> str:
    """Where along the leading axis a leaf is not finite, as `[index]`; empty if it is finite."""
    finite = jnp.isfinite(leaf)
    if finite.all():
        return ""
    if leaf.ndim < 2:
        return f"[{int(jnp.argmin(finite))}]"
    return f"[{int(jnp.argmin(finite.reshape(leaf.shape[0], -1).all(axis=1)))}]"
