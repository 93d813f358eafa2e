"""Writes docs/configuration.md from the dataclasses that declare the fields: `make docs`."""

import importlib
from pathlib import Path

from jaxllm.config import field_rows
from jaxllm.main import STAGES

PAGE = Path(__file__).parent / "configuration.md"

_HEAD = """# Configuration

A configuration file is a Python file with `get_config(preset="")`, which returns an
`ml_collections.ConfigDict`; those in `configs/` start from the defaults below. Any field is
overridden on the command line by `--config.path.to.field=value`. Lists are comma strings. A field
that does not exist, or a value of another type, ends the program with exit code 2 and the nearest
field that does exist.

A resumed run may change `steps`, `log`, `eval`, `checkpoint`, `mesh` and `compare`; anything else
needs another `--workdir`. `generate_data` may change how its teacher is asked as well
([data from a teacher](generate_data.md#stopped-and-started-again)).

This page is made by `make docs` from the declarations; do not edit it.
"""


def page() -> str:
    """The page as it should stand."""
    parts = [_HEAD]
    for stage, (module_name, config_name) in STAGES.items():
        config = getattr(importlib.import_module(module_name), config_name)
        parts.append(f"\n## `{stage}`\n\n{config.__doc__.strip()}\n")
        parts.append("\n| field | default | |\n|---|---|---|\n")
        for path, default, text in sorted(field_rows(config), key=_order):
            cell = text.replace("|", "\\|")
            parts.append(f"| `{path}` | `{default}` | {cell} |\n")
    return "".join(parts)


def _order(row: tuple[str, str, str]) -> tuple[bool, str]:
    """Fields of their own first, then the groups by name."""
    path = row[0]
    return "." in path, path.split(".")[0] if "." in path else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
