"""Where a loss stopped being finite: the first parameter, layer or gradient that is not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.objectives.objective import Batch, Objective, Params, RowKeys
from jaxllm.training.step import loss_and_gradients


def first_non_finite(
    objective: Objective, params: Params, frozen: Params, batch: Batch, row_keys: RowKeys
) -> str:
    """Names the first tensor at fault: of the parameters, else of the forward pass, else of the
    gradients; in the forward pass in the order of computation, with the layer's number.

    It runs the objective once more with every module's output watched, whatever the model;
    `row_keys` are the keys that the rows drew from.
    """
    everything = trees.merge(params, frozen)
    for path, leaf in trees.leaves_with_paths(everything):
        if place := _place(leaf):
            return f"the parameter {path}{place} is not finite"
    watched = _Watched()
    with nn.intercept_methods(watched.intercept):
        loss, gradients, _ = jax.jit(
            lambda params, batch: loss_and_gradients(objective, params, frozen, batch, row_keys, 1)
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
    """Notes every module whose output is not finite, and which of them came first."""

    def __init__(self) -> None:
        self._traced: dict[str, int] = {}
        self._calls: Counter[str] = Counter()
        self._faults: list[tuple[int, int, int, str]] = []

    @property
    def first(self) -> str:
        """The first module at fault in the order of computation; empty if there is none."""
        if not self._faults:
            return ""
        _, repeat, _, path = min(self._faults)
        return f"{path} (repeat {repeat} of its stack)" if "stack_" in path else path

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
            self._traced.setdefault(path, len(self._traced))
            leaves = jax.tree.leaves(output)
            floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
            finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floating]))
            jax.debug.callback(lambda ok, path=path: self._note(path, ok), finite)
        return output

    def _note(self, path: str, finite: Any) -> None:
        # A scanned layer is traced once and runs once for each repeat of its stack, so its calls
        # count repeats. Calls of different modules may arrive out of order: what ranks them is
        # the order of tracing, of the stack first, then of the repeat, then of the module in it.
        repeat = self._calls[path]
        self._calls[path] += 1
        if not finite:
            stack = path.split("/")[0]
            begin = min(at for name, at in self._traced.items() if name.split("/")[0] == stack)
            self._faults.append((begin, repeat, self._traced[path], path))


def _place(leaf: jax.Array) -> str:
    """Where along the leading axis a leaf is not finite, as `[index]`; empty if it is finite."""
    finite = jnp.isfinite(leaf)
    if finite.all():
        return ""
    if leaf.ndim < 2:
        return f"[{int(jnp.argmin(finite))}]"
    return f"[{int(jnp.argmin(finite.reshape(leaf.shape[0], -1).all(axis=1)))}]"
