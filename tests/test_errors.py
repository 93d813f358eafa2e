"""Which errors say that a store has not answered."""

import errno
import os

import pytest

from jaxllm.errors import unanswered


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN]
)
def test_a_store_that_does_not_answer_is_known_by_number_and_by_text(number):
    assert unanswered(OSError(number, "what", "/store/file"))
    assert unanswered(ValueError(f"INTERNAL: Error reading file: {os.strerror(number)}"))


@pytest.mark.parametrize(
    "text",
    [
        "UNAVAILABLE: connection reset by peer",
        "DEADLINE_EXCEEDED: took longer than 60 s",
        "Read timed out.",
    ],
)
def test_the_answers_of_object_stores_are_known(text):
    assert unanswered(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/store/file"),
        FileNotFoundError(errno.ENOENT, "No such file", "/UNAVAILABLE/file"),
        ValueError("DATA_LOSS: checksum of the shard differs"),
    ],
)
def test_what_is_stored_wrong_or_not_at_all_is_no_silence(error):
    assert not unanswered(error)
