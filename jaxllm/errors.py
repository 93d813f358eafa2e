"""The two ways a run ends on purpose before it is done, each with its exit code."""

import errno
import os
import re

_UNANSWERED_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN)
# Libraries tell only the text of such an error; and so do object stores.
_UNANSWERED_TEXTS = re.compile(
    "|".join(
        ["UNAVAILABLE", "DEADLINE_EXCEEDED", "timed out"]
        + [re.escape(os.strerror(number)) for number in _UNANSWERED_ERRNOS]
    )
)


class UserError(Exception):
    """A mistake that the user can mend: told in one line, without a traceback, exit code 2.

    The message says what is wrong, where (a config field, a file and line) and what to do.
    """

    exit_code = 2


class Preempted(BaseException):
    """The run was asked to stop, saved what could be saved, and wants to be run again: code 75.

    Like `KeyboardInterrupt` it may be raised at any line, by a signal, and is no `Exception`: what
    survives a damaged checkpoint or a full disk must not take it for one.
    """

    exit_code = 75

    def __init__(self, message: str, *, together: bool = False) -> None:
        """`together`: every process of the run stops here, after the same step."""
        super().__init__(message)
        self.together = together


def unanswered(error: Exception) -> bool:
    """Whether an error says that a store has not answered, which it may do later."""
    number = getattr(error, "errno", None)
    if number is not None:
        return number in _UNANSWERED_ERRNOS
    return bool(_UNANSWERED_TEXTS.search(str(error)))
