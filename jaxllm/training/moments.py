"""The optimizer's moments: the dtype that they are stored in, and how they lie on the mesh."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import trees
from jaxllm.training.rounding import stochastic_round


def stored_in(
    dtype: str, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its moments kept in `dtype`, `float32` or `bfloat16`.

    All is computed in float32; what is kept is rounded by chance, by the argument `key` of
    `update`.
    """
    if dtype == "float32":
        return optax.with_extra_args_support(optimizer)

    def cast(state: Any, dtype: str) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf.astype(dtype) if parameter_path(keys) else leaf, state
        )

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(gradients: Any, state: Any, params: Any = None, *, key: Any) -> tuple[Any, Any]:
        directions, new = optimizer.update(gradients, cast(state, "float32"), params)
        return directions, stochastic_round(new, state, key)

    return optax.GradientTransformationExtraArgs(init, update)


def moment_shardings(opt_shapes: Any, param_shapes: trees.Tree, by_param: Any, mesh: Mesh) -> Any:
    """How the optimizer's state lies on the mesh: as the parameters that its leaves belong to.

    A moment of the shape of its parameter has the same sharding; one that lacks an axis (the
    row or column means of a factored moment) that of the axes it has; all else is replicated.

    Args:
        opt_shapes: the optimizer's state as shapes; it holds trees of the parameters' nesting.
        param_shapes: the parameters as shapes.
        by_param: their shardings.
        mesh: the mesh of these.
    """
    shapes = {path: leaf.shape for path, leaf in trees.leaves_with_paths(param_shapes)}
    specs = {path: leaf.spec for path, leaf in trees.leaves_with_paths(by_param)}

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = parameter_path(keys)
        spec = _spec_for(leaf.shape, shapes[path], specs[path]) if path else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, opt_shapes)


def parameter_path(keys: tuple[Any, ...]) -> str:
    """The parameter that a leaf of the optimizer's state belongs to, by the dicts it lies in."""
    names = (key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
    return "/".join(names)


def _spec_for(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    """The spec of a moment of `shape`, given its parameter's."""
    if shape == param_shape:
        return spec
    axes = [*spec, *[None] * (len(param_shape) - len(spec))]
    for missing in reversed(range(len(param_shape))):
        if shape == param_shape[:missing] + param_shape[missing + 1 :]:
            return PartitionSpec(*axes[:missing], *axes[missing + 1 :])
    return PartitionSpec()
