"""Sharding rules by path: which dimension of which parameter lies on which mesh axis."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import trees
from jaxllm.errors import UserError

Rules = Sequence[tuple[str, PartitionSpec]]


def shardings(tree: trees.Tree, rules: Rules, mesh: Mesh) -> Any:
    """The tree of `NamedSharding`s for a tree of arrays or shapes.

    Args:
        tree: a parameter tree of arrays or `jax.ShapeDtypeStruct`s.
        rules: (pattern over the whole path, spec); the first that matches counts, and every
            parameter must match one.
        mesh: the mesh that the specs name axes of.

    Raises:
        UserError: an axis of the mesh does not divide the dimension that it should split.
        LookupError: a parameter that no rule matches.
    """

    def sharding(path: str, leaf: Any) -> NamedSharding:
        spec = trees.match(rules, path)
        _check_divides(path, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return trees.map_with_paths(sharding, tree)


def with_shardings(shapes: trees.Tree, rules: Rules, mesh: Mesh) -> Any:
    """`shapes` with the sharding that the rules give to each, ready to restore or compile into."""
    return jax.tree.map(with_sharding, shapes, shardings(shapes, rules, mesh))


def with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    """`shape` with a sharding."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _check_divides(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"the rule {spec} has more dimensions than {path} of shape {shape}")
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise UserError(
                f"config.mesh: {' x '.join(names)} = {parts} does not divide a dimension of "
                f"{size} of the parameter {path} {shape}; choose a divisor of {size}."
            )
