"""Fields of a published `config.json`, each of the type that it has to be of.

What is of another type, is not finite, or is absurdly large is refused with a `ValueError` that
begins with the name of the field and shows its value. `also` is another name that a field goes
by; `within`, the name of the object that it is in, with a point.
"""

import reprlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

Theirs = Mapping[str, Any]
"""A published `config.json`, or an object in it."""

LARGEST = 1_000_000_000
"""Of sizes and positions: dimensions and indices are kept in 32 bits."""
MOST_PARTS = 1024
"""Of layers and of experts, each of which has tensors of its own."""


def integer(
    config: Theirs,
    name: str,
    default: int | None,
    *,
    also: str = "",
    within: str = "",
    least: int = 1,
    most: int = LARGEST,
) -> int:
    """An integer from `least` to `most`."""
    found = _found(config, name, default, also)
    if type(found) is not int or found < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{within}{name}: must be {wanted}, and is {shown(found)}")
    if found > most:
        raise ValueError(f"{within}{name}: must be at most {most:,}, and is {shown(found)}")
    return found


def number(
    config: Theirs,
    name: str,
    default: int | float | None,
    *,
    also: str = "",
    within: str = "",
    zero: bool = False,
) -> float:
    """A positive number or, if `zero`, one that is not negative."""
    found = _found(config, name, default, also)
    # Larger than the largest is what is not finite, and an integer that is no float.
    if (
        type(found) not in (int, float)
        or not 0 <= found <= sys.float_info.max
        or (found == 0 and not zero)
    ):
        wanted = "a number, not negative" if zero else "a positive number"
        raise ValueError(f"{within}{name}: must be {wanted}, and is {shown(found)}")
    return float(found)


def switch(config: Theirs, name: str, default: bool | None, *, also: str = "") -> bool:
    """True or false."""
    found = _found(config, name, default, also)
    if type(found) is not bool:
        raise ValueError(f"{name}: must be true or false, and is {shown(found)}")
    return found


def choice(
    config: Theirs,
    name: str,
    default: str,
    known: Collection[str],
    *,
    also: str = "",
    within: str = "",
) -> str:
    """One of the known words."""
    found = _found(config, name, default, also)
    if not isinstance(found, str) or found not in known:
        raise ValueError(
            f"{within}{name}: {shown(found)} is not supported; known are {', '.join(known)}"
        )
    return found


def group(config: Theirs, name: str, *, within: str = "") -> dict[str, Any]:
    """An object; empty where it is missing or null."""
    found = config.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{within}{name}: must be an object, and is {shown(found)}")
    return found or {}


def shown(found: Any) -> str:
    """A value as a message shows it, the beginning of one that is long."""
    return reprlib.repr(found)


def _found(config: Theirs, name: str, default: Any, also: str) -> Any:
    return config.get(name, config.get(also, default))
