"""Files that are either the old or the new one, never half of it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8 in place of what `path` held, at once; newlines stay as they are.

    A character that UTF-8 cannot hold (half of a surrogate pair) becomes a question mark.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as it was before.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives a file that only its owner can read; a report is for everyone allowed in.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON for people to read too, in place of what `path` held, at once."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
