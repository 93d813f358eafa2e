"""What Orbax and TensorStore print of saves, which the run's own lines say better, is left out."""

import logging
import sys
from typing import Any

_show_unraisable = sys.unraisablehook


def quieten() -> None:
    """Hides their progress, and the errors that follow the first of a failed save."""
    # Of each save Orbax logs what would drown the progress line, by the logger of all of absl.
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    # Each array of a failed save has an error of its own, and only the first is waited for.
    logging.getLogger("asyncio").addFilter(_is_not_of_a_save)
    sys.unraisablehook = _show_unless_closed


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    return "orbax-checkpoint-tmp" not in str(record.msg)


def _show_unless_closed(unraisable: Any) -> None:
    """TensorStore's threads end in an event loop that a failed save has closed."""
    closed = unraisable.exc_type is RuntimeError and "loop is closed" in str(unraisable.exc_value)
    if not closed:
        _show_unraisable(unraisable)
