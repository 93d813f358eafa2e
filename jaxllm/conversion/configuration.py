"""A published `config.json`, as a `ModelConfig`, and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxllm.conversion import typed
from jaxllm.conversion.tables import TABLES, Table
from jaxllm.conversion.typed import Theirs
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture, completed

CONFIG = "config.json"

# Fields that say how a model is computed or trained, of which a published one says nothing.
_UNTOLD = (
    "dtype",
    "param_dtype",
    "reduction_dtype",
    "remat",
    "attention",
    "dropout",
    "embedding_dropout",
    "load_balance_loss",
    "router_z_loss",
)


def is_published(path: str | Path) -> bool:
    """Whether `path` is a folder of published weights, with their `config.json` in it."""
    try:
        return "model_type" in _their_config(Path(path))
    except UserError:
        return False


def check_is_model(path: str | Path) -> None:
    """Checks by its `config.json` that `path` is a run directory or a folder of published weights.

    Raises:
        UserError: it is neither; the message says why.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path}: is no run directory (it has no {CONFIG}), and no folder of published weights "
            "in the Hugging Face format; give the --workdir of an earlier run, or such a folder. "
            "Nothing is downloaded by the name of a model."
        )
    if not _their_config(path).keys() & {"config", "model_type"}:
        raise UserError(
            f"{path / CONFIG}: is neither that of a run, which has a `config`, nor that of "
            "published weights, which has a `model_type`."
        )


def table_of(folder: str | Path) -> Table:
    """The table of the family that the folder's `config.json` names.

    Raises:
        UserError: the family is unknown (the known ones are listed), or there is no such file.
    """
    return TABLES[_family_of(Path(folder), _their_config(Path(folder)))]


def read_config(folder: str | Path) -> ModelConfig:
    """The model that the folder's `config.json` describes.

    Raises:
        UserError: it cannot be read, is of an unknown family, or says something that no model of
            ours can do; the message names field and value.
    """
    folder = Path(folder)
    theirs = _their_config(folder)
    family = _family_of(folder, theirs)
    if "auto_map" in theirs:
        raise UserError(
            f"{folder / CONFIG}: auto_map: the model is defined by code that comes with it, which "
            "is not run; take weights without such code."
        )
    table = TABLES[family]
    ours: dict[str, Any] = {"family": family}
    try:
        if theirs["model_type"] in table.also:
            theirs = {**theirs, **typed.group(theirs, "text_config")}
        for row in table.config:
            ours |= row.read(theirs)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}.") from None
    try:
        config = ModelConfig(**ours)
        architecture(config, config.vocab_size)
    except (ValueError, UserError) as error:  # fields that do not go together
        name, _, what = str(error).removeprefix("config.model.").removesuffix(".").partition(":")
        known = {field: row.theirs for row in table.config for field in row.ours}
        named = f"{known[name]} (our {name})" if known.get(name, name) != name else name
        raise UserError(f"{folder / CONFIG}: {named}:{what}.") from None
    return config


def written_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` that describe the model.

    Args:
        config: of the model, with the rows of its embedding and its positions told.

    Raises:
        UserError: the published family cannot say what a field of `config` says.
    """
    table, whole = TABLES[config.family], completed(config)
    told = {name for row in table.config for name in row.ours} | {"family", *_UNTOLD}
    untold: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(config) if field.name not in told
    }
    fields: dict[str, Any] = {
        "model_type": table.model_type,
        "architectures": [table.architecture],
    }
    try:
        # What cannot be told must be as it is where nothing is said of it.
        plain = completed(dataclasses.replace(whole, **untold))
        for name in untold:
            if getattr(whole, name) != getattr(plain, name):
                raise ValueError(f"{name}: is {getattr(whole, name)!r}")
        for row in table.config:
            fields |= row.write(whole)
    except ValueError as error:
        raise UserError(
            f"config.model.{error}; published models of the family {config.family!r} cannot be "
            "like that, so this one cannot be exported."
        ) from None
    return fields


def _their_config(folder: Path) -> Theirs:
    try:
        theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{folder / CONFIG}: cannot be read (it is nested too deeply).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error}).") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{folder / CONFIG}: cannot be read (it is no object).")
    return theirs


def _family_of(folder: Path, theirs: Theirs) -> str:
    model_type = theirs.get("model_type")
    for family, table in TABLES.items():
        if model_type in (table.model_type, *table.also):
            return family
    known = ", ".join(table.model_type for table in TABLES.values())
    raise UserError(
        f"{folder / CONFIG}: model_type: {typed.shown(model_type)} is no family that weights are "
        f"read of; known are {known}."
    )
