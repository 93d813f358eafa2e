"""The command line: a configuration file, a work directory, and overrides of fields."""

import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxllm import config as configuration
from jaxllm.checkpoints import run_directory
from jaxllm.errors import UserError

USAGE = (
    "python -m jaxllm.main --config=configs/STAGE.py[:PRESET] --workdir=DIR "
    "[--config.path.to.field=value ...]"
)
_OVERRIDE = re.compile(r"--?config\.([\w.]+)(=.*)?", re.DOTALL)


def parse(arguments: Sequence[str]) -> tuple[ConfigDict, Path | None]:
    """The configuration, overrides applied, and the work directory if one is given.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a file that is not there.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "PATH[:PRESET]", flag_values=values)
    flags.DEFINE_string("workdir", None, "the run directory", flag_values=values)
    overrides = [argument for argument in arguments if _OVERRIDE.fullmatch(argument)]
    _parse(values, [argument for argument in arguments if argument not in overrides])
    if not values.config:
        raise UserError(f"--config is missing; usage: {USAGE}")
    config = load_config(values.config)
    override(config, overrides)
    return config, Path(values.workdir) if values.workdir else None


def load_config(argument: str) -> ConfigDict:
    """What `get_config(preset)` of the file `PATH[:PRESET]` returns; or what a run recorded, of its
    `config.json`.

    Raises:
        UserError: there is no such file, no such preset, or the file sets a field wrongly.
    """
    path, _, preset = argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file; configs/ has one for each stage.")
    if path.endswith(".json") and not preset:
        return ConfigDict(run_directory.recorded(Path(path), "config")).lock()
    spec = importlib.util.spec_from_file_location("jaxllm_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = _get_config(module.get_config, path, preset)
    except UserError:
        raise
    except Exception as error:
        # A ConfigDict refuses an unknown field or a wrong type; and the file may be wrong in any
        # way that Python can be.
        raise UserError(f"{path}{_line(error, spec.origin)}: {_reason(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return an ml_collections.ConfigDict.")
    return config


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Applies `--config.path.to.field=value` arguments to `config`, in place.

    Raises:
        UserError: a field that does not exist (the nearest is suggested), or a wrong type.
    """
    known = configuration.flatten(config)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        assert match is not None
        path, value = match.groups()
        if path not in known:
            raise UserError(configuration.unknown_field(path, list(known)))
        if value is None and not isinstance(known[path], bool):
            raise UserError(f"--config.{path}: give a value, as in --config.{path}=VALUE.")
    values = flags.FlagValues()
    argv = ["", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        refused = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if refused is None:
            raise UserError(" ".join(str(error).split())) from None
        path, value = refused.groups()
        kind = type(known[path]).__name__
        raise UserError(f"config.{path}: must be {kind}, and was given {value!r}.") from None


def _line(error: Exception, path: str | None) -> str:
    """`:LINE` of the configuration file that an error comes from, if it can be told."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f":{lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    """One line that says what is wrong."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    # What a ConfigDict says is whole sentences; of others, the type is half of what they say.
    kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"


def _get_config(get_config: Callable[..., Any], path: str, preset: str) -> Any:
    if not preset:
        return get_config()
    if not inspect.signature(get_config).parameters:
        raise UserError(f"--config={path}:{preset}: {path} has no presets.")
    return get_config(preset)


def _parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    try:
        rest = values(["", *arguments])
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; usage: {USAGE}") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; usage: {USAGE}")
