"""Atomic writing leaves the old file or the new one."""

import os
import threading

import pytest

from jaxllm.errors import UserError
from jaxllm.files import locked, write_atomically


def test_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "report.html"
    write_atomically(path, "old")
    write_atomically(path, "new\r\n中文")
    assert path.read_bytes() == "new\r\n中文".encode()
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_others_may_read_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_locked_folder_is_held_until_it_is_let_go(tmp_path, capsys):
    order = []

    def second():
        with locked(tmp_path / "new"):
            order.append("second")

    with locked(tmp_path / "new"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "waiting for another process" in capsys.readouterr().err


def test_patience_with_another_process_has_an_end(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another process writes here"),
        locked(tmp_path, patience=0.3),
    ):
        pass
    with locked(tmp_path, patience=0.0):
        pass


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "below"):
        pass
