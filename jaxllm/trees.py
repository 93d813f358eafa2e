"""Parameter trees as paths: naming leaves, choosing them by pattern, splitting and merging.

A parameter tree is a nest of plain dicts with arrays at the leaves; a leaf's path is its keys
joined with `/`, as in `stack_0/layer_0/attention/query/kernel`. Everything that treats some
parameters differently (sharding, learning rates, weight decay, what is trained) names them by a
regular expression over the *whole* path, and goes through this file.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from jaxllm.errors import UserError

T = TypeVar("T")
Tree = Mapping[str, Any]


def leaves_with_paths(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with their paths, in the order of insertion."""
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from leaves_with_paths(value, path)
        else:
            yield path, value


def map_with_paths(function: Callable[[str, Any], T], tree: Tree, prefix: str = "") -> Any:
    """The tree of `function(path, leaf)`."""
    result: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        mapping = isinstance(value, Mapping)
        result[name] = map_with_paths(function, value, path) if mapping else function(path, value)
    return result


def match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """The value of the first rule whose pattern matches the whole of `path`.

    Raises:
        LookupError: no rule matches. Rules are part of the program, and must cover every path.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise LookupError(f"no rule matches the parameter {path!r}")


def split(tree: Tree, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into the leaves whose path matches `pattern`, and the rest.

    Each part keeps the nesting of the whole, without the branches that became empty.

    Raises:
        UserError: the pattern matches nothing.
    """
    matching, rest = divide(tree, pattern)
    if not matching:
        paths = [path for path, _ in leaves_with_paths(tree)]
        raise UserError(
            f"the pattern {pattern!r} matches no parameter; the paths look like "
            f"{paths[0]!r}, {paths[-1]!r}."
        )
    return matching, rest


def divide(tree: Tree, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `split`; either part may be empty."""
    matching: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for path, leaf in leaves_with_paths(tree):
        insert(matching if re.fullmatch(pattern, path) else rest, path, leaf)
    return matching, rest


def merge(first: Tree, second: Tree) -> dict[str, Any]:
    """The union of two trees that share no leaf; the inverse of `split`."""
    merged = dict(first)
    for name, value in second.items():
        if name in merged:
            if not (isinstance(merged[name], Mapping) and isinstance(value, Mapping)):
                raise ValueError(f"both trees hold the leaf {name!r}")
            value = merge(merged[name], value)
        merged[name] = value
    return merged


def replaced(tree: Tree, leaves: Tree) -> dict[str, Any]:
    """The tree with some leaves put in the place of its own, or added."""
    result = dict(tree)
    for name, value in leaves.items():
        own = result.get(name)
        if isinstance(own, Mapping) and isinstance(value, Mapping):
            value = replaced(own, value)
        result[name] = value
    return result


def insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf at its path into nested dicts."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def size(tree: Any) -> int:
    """The number of array elements in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
