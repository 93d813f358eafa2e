"""The `recipe` stage: several runs one after another, each begun from an earlier one.

Its configuration holds those of its parts by name, and in `order` the names in the order in which
they are run. A part has the run directory of its name in the work directory, and an `init` that is
the name of an earlier part means that one's.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.errors import UserError


class Part(NamedTuple):
    """A run of a recipe."""

    name: str
    stage: str
    run: Callable[[Path], None]


def run(
    config: Mapping[str, Any],
    workdir: Path | None,
    made: Callable[[str, Mapping[str, Any]], Callable[[Path], None]],
) -> None:
    """Runs the parts; one that is finished says so, and one that was cut off goes on.

    Args:
        config: of the recipe.
        workdir: where the parts have their directories.
        made: `made(path, config)` checks the configuration of a part, which stands at `path` in
            that of the recipe, and gives what runs it in a directory.

    Raises:
        UserError: a part is wrong; nothing has been run then. Or as the stages do.
    """
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the runs are to be kept in.")
    names = [name.strip() for name in config.get("order", "").split(",") if name.strip()]
    if not names:
        raise UserError("config.order: name the parts of the recipe, as in base,tuned.")
    parts = []
    known = [name for name, value in config.items() if isinstance(value, Mapping)]
    for place, name in enumerate(names):
        if name not in known or names.count(name) > 1:
            raise UserError(
                f"config.order: {name!r} is no part, or stands twice; there are {', '.join(known)}."
            )
        # Resolved: a run that goes on has to be told the same, however the directory is spelt.
        earlier = {before: str(workdir.resolve() / before) for before in names[:place]}
        own = _placed(config[name], {**dict.fromkeys(known), **earlier}, name)
        parts.append(Part(name, own.get("stage", ""), made(name, own)))
    for number, part in enumerate(parts, start=1):
        folder = workdir / part.name
        print(f"{folder}: {part.stage}, part {number} of {len(parts)}", file=sys.stderr, flush=True)
        try:
            part.run(folder)
        except UserError as error:
            raise UserError(f"{part.name}: {error}") from error


def _placed(
    config: Mapping[str, Any], folders: Mapping[str, str | None], path: str
) -> dict[str, Any]:
    """The configuration at `path` with the directories of earlier parts in the place of their
    names; None: the part is no earlier one.

    Raises:
        UserError: one that is not earlier is named.
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found[name] = _placed(value, folders, f"{path}.{name}")
        elif name == "init" and isinstance(value, str) and value in folders:
            if folders[value] is None:
                raise UserError(
                    f"config.{path}.{name}: {value!r} is a part that does not stand before this "
                    "one in config.order; put it there."
                )
            found[name] = folders[value]
        else:
            found[name] = value
    return found
