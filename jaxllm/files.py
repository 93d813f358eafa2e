"""Files that are either the old or the new one, never half of it; folders that one may change."""

import contextlib
import fcntl
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import UserError

_LOOK_SECONDS = 0.2


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8 in place of what `path` held, at once; newlines stay as they are.

    A character that UTF-8 cannot hold (half of a surrogate pair) becomes a question mark.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as it was before.
    """
    write_bytes_atomically(path, text.encode("utf-8", errors="replace"))


def write_bytes_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` in place of what `path` held, at once.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as it was before.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives a file that only its owner can read; a report is for everyone allowed in.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write knows no name
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON for people to read too, in place of what `path` held, at once."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def locked(folder: str | os.PathLike, patience: float = math.inf) -> Iterator[None]:
    """Holds `folder`, made if need be, while others who ask for it wait; on one machine.

    A process that ends, in whatever way, lets go of it. A folder that cannot be written needs no
    lock, and gets none.

    Raises:
        UserError: another process still holds it after `patience` seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(Path(folder, ".lock").open("w"))
        except OSError:
            yield
            return
        until, told = time.monotonic() + patience, False
        while not _is_locked(file):
            if time.monotonic() >= until:
                raise UserError(
                    f"{folder}: another process writes here; wait until it has ended, or give "
                    "another folder."
                )
            if not told:
                print(f"{folder}: waiting for another process that writes here", file=sys.stderr)
                told = True
            time.sleep(_LOOK_SECONDS)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Whether the lock on `file` is free, and ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        pass
    return True
