"""Configuration: frozen dataclasses inside, an `ml_collections.ConfigDict` at the edge.

A room declares its options once, as a frozen dataclass whose fields carry a docstring each.
A stage nests those dataclasses into one of its own. From that single declaration come the
defaults of a config file (`config_dict`), the checked values inside the program (`from_dict`),
and the tables of `docs/configuration.md` (`field_rows`).
"""

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from jaxllm.errors import UserError

T = TypeVar("T")


def config_dict(config: Any) -> ConfigDict:
    """A dataclass instance as a `ConfigDict` for a config file to change; it refuses new fields."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_dict(cls: type[T], values: Mapping[str, Any] | ConfigDict, path: str = "") -> T:
    """Builds the frozen dataclass `cls` from nested mappings and checks it.

    Args:
        cls: a frozen dataclass, whose fields are `int`, `float`, `bool`, `str` or dataclasses;
            its `__post_init__` may raise `ValueError("field: what is wrong")`.
        values: a `ConfigDict` or plain nested dict; a missing field keeps its default.
        path: where `values` stands in the whole configuration, for messages.

    Raises:
        UserError: an unknown field (the nearest known one is suggested), a wrong type, or a
            value that the dataclass refuses; the message names the field by its full path.
    """
    return _updated(cls(), values, path)


def unknown_field(path: str, known: list[str]) -> str:
    """The message for a field that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    leaf = path.rsplit(".", 1)[-1]
    nearest = nearest or [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"did you mean config.{nearest[0]}?" if nearest else "see docs/configuration.md."
    return f"config.{path}: there is no such field; {hint}"


def flatten(values: Mapping[str, Any] | ConfigDict, path: str = "") -> dict[str, Any]:
    """Nested mappings as one flat dict from dotted path to value."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, _join(path, name)))
        else:
            flat[_join(path, name)] = value
    return flat


def field_rows(cls: type) -> Iterator[tuple[str, str, str]]:
    """Rows (dotted path, default, description) of every field of `cls`, nested ones included."""
    return _rows(cls())


def _rows(defaults: Any) -> Iterator[tuple[str, str, str]]:
    docs = _field_docstrings(type(defaults))
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            for path, text, description in _rows(default):
                yield f"{field.name}.{path}", text, description
        else:
            yield field.name, repr(default), docs.get(field.name, "")


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string that follows each field in the source of `cls` or of a class it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docstrings(base)
    return docs


def _own_field_docstrings(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def _updated(defaults: T, values: Mapping[str, Any] | ConfigDict, path: str) -> T:
    """`defaults`, a dataclass instance, with some of its fields set to checked values."""
    hints = typing.get_type_hints(type(defaults))
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(unknown_field(_join(path, name), _paths(defaults, path)))
        default = getattr(defaults, name)
        arguments[name] = _checked(hints[name], default, value, _join(path, name))
    try:
        return dataclasses.replace(defaults, **arguments)  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(f"config.{_join(path, str(error))}") from None


def _checked(kind: type, default: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"config.{path}: is a group of fields, and was given {value!r}.")
        return _updated(default, value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path}: must be a finite number, and was given {value!r}.")
    if type(value) is not kind:
        raise UserError(
            f"config.{path}: must be {kind.__name__}, and was given {value!r} "
            f"({type(value).__name__})."
        )
    return value


def _paths(defaults: Any, path: str) -> list[str]:
    return [_join(path, name) for name, _, _ in _rows(defaults)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
