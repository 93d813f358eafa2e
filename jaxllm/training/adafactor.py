"""Adafactor, whose second moment of a matrix is kept as the means of its rows and columns."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxllm import trees

# A state of `_LAYER` whose arrays lead with an axis of layers, as vmap wants it told; the count
# of steps is one for all.
_STACKED = (optax.FactoredState(count=None, v_row=0, v_col=0, v=0), optax.EmptyState())
# Gradient over the root of its second moment, scaled down to a root mean square of 1.
_LAYER = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def adafactor(matrices: str) -> optax.GradientTransformation:
    """The direction of Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235).

    No first moment, no learning rate of its own, no scaling by the size of parameters; the
    second moment at step t decays by 1 - t^-0.8. A matrix of at least 128 x 128 has it factored:
    [..., in, out] is kept as [..., in] and [..., out]. Each matrix of a stack, over layers and
    experts, is treated alone.

    Args:
        matrices: pattern over the whole path of the parameters whose last two axes are a matrix;
            the last axis of the others is a vector.
    """

    def stack_axes(params: trees.Tree) -> Any:
        def count(path: str, leaf: Any) -> int:
            return max(0, leaf.ndim - (2 if re.fullmatch(matrices, path) else 1))

        return trees.map_with_paths(count, params)

    def init(params: Any) -> Any:
        return jax.tree.map(
            lambda param, axes: _over_stack(_LAYER.init, axes, (0,), _STACKED)(param),
            params,
            stack_axes(params),
        )

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # At each leaf of the gradients the state has a whole state of `_LAYER`.
        results = jax.tree.map(
            lambda gradient, axes, layer_state, param: _over_stack(
                _LAYER.update, axes, (0, _STACKED, 0), (0, _STACKED)
            )(gradient, layer_state, param),
            gradients,
            stack_axes(gradients),
            state,
            params,
        )
        return (
            jax.tree.map(lambda _, result: result[0], gradients, results),
            jax.tree.map(lambda _, result: result[1], gradients, results),
        )

    return optax.GradientTransformation(init, update)


def _over_stack(
    function: Callable[..., Any], axes: int, in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """`function` of one matrix or vector, mapped over the leading axes of a stack of them."""
    for _ in range(axes):
        function = jax.vmap(function, in_axes=in_axes, out_axes=out_axes)
    return function
