"""Checkpoints that are broken, half written or gone: the one before is used."""

import os

import jax
import numpy as np
import pytest

from jaxllm.errors import Preempted, UserError


def _break(folder, share=0.5):
    """Truncates the largest file under a checkpoint, where the values are; with no checksums it is
    Orbax that has to find it."""
    for path in folder.glob("checksums.*"):
        path.unlink()
    largest = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, int(largest.stat().st_size * share))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(
    open_checkpointer, warnings, tmp_path, share
):
    open_checkpointer(3).save_steps(1, 2, 3)
    for step in (2, 3):
        _break(tmp_path / "checkpoints" / str(step), share)
    checkpointer = open_checkpointer(3)
    assert checkpointer.restored_step() == 1
    assert [message.split(" (")[0] for message in warnings] == [
        "checkpoint 3 cannot be read",
        "checkpoint 2 cannot be read",
    ]
    assert checkpointer.steps() == [1]
    assert (tmp_path / "checkpoints" / "broken-3").is_dir()
    # The step comes again, and breaks again.
    checkpointer.save_steps(3)
    assert checkpointer.steps() == [1, 3]
    _break(tmp_path / "checkpoints" / "3", share)
    assert open_checkpointer(3).restored_step() == 1


@pytest.mark.parametrize(
    "pattern",
    [
        "params/manifest.ocdbt",
        "params/_METADATA",
        "params/ocdbt.process_0/manifest.ocdbt",
        "progress/manifest.ocdbt",
        "progress/_METADATA",
    ],
)
def test_any_damaged_file_is_survived(open_checkpointer, warnings, tmp_path, pattern):
    open_checkpointer().save_steps(1, 2)
    (damaged,) = (tmp_path / "checkpoints" / "2").glob(pattern)
    os.truncate(damaged, damaged.stat().st_size // 2)
    # Either the file was not needed, and all values are right, or the one before is used.
    step = open_checkpointer().restored_step()
    assert step == 2 - len(warnings)


def test_an_item_that_is_missing_is_survived(open_checkpointer, warnings, tmp_path):
    open_checkpointer().save_steps(1, 2)
    (tmp_path / "checkpoints" / "2" / "progress").rename(tmp_path / "elsewhere")
    assert open_checkpointer().restored_step() == 1
    assert len(warnings) == 1


def test_all_broken_is_told(open_checkpointer, tmp_path):
    open_checkpointer().save_steps(1, 2)
    for step in (1, 2):
        _break(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"none of its checkpoints can be read"):
        open_checkpointer().restored_step()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_half_written_checkpoint_is_passed_over_and_removed(open_checkpointer, tmp_path):
    open_checkpointer().save_steps(1)
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (leftover / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (leftover / "params.orbax-checkpoint-tmp" / "d").write_bytes(b"part")
    read_only = open_checkpointer(read_only=True)
    assert read_only.restored_step() == 1
    assert leftover.is_dir()
    checkpointer = open_checkpointer()
    assert checkpointer.restored_step() == 1
    assert not leftover.exists()
    checkpointer.save_steps(2)
    assert checkpointer.steps() == [1, 2]


def test_read_only_changes_nothing_even_beside_a_broken_checkpoint(
    open_checkpointer, warnings, tmp_path
):
    open_checkpointer(3).save_steps(1, 2, 3)
    _break(tmp_path / "checkpoints" / "3")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpointer = open_checkpointer(1, read_only=True)
    assert checkpointer.restored_step() == 2
    step, params = checkpointer.read_params()
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, checkpointer.params(2))
    checkpointer.close()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_signal_while_restoring_does_not_make_a_checkpoint_broken(
    open_checkpointer, warnings, monkeypatch
):
    checkpointer = open_checkpointer()
    checkpointer.save_steps(1, 2)

    def stopped(*args, **kwargs):
        raise Preempted("stopped by SIGTERM")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._orbax, "restore", stopped)
        with pytest.raises(Preempted):
            checkpointer.restored_step()
    assert warnings == []
    assert checkpointer.steps() == [1, 2]


def test_a_flipped_bit_is_found_which_orbax_does_not_see(open_checkpointer, warnings, tmp_path):
    open_checkpointer(3).save_steps(1, 2)
    newest = tmp_path / "checkpoints" / "2"
    largest = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert open_checkpointer(3).restored_step() == 1
    (warning,) = warnings
    assert f"{largest.relative_to(newest)} has changed since it was written" in warning
    assert (tmp_path / "checkpoints" / "broken-2").is_dir()


def test_checkpoints_that_were_all_set_aside_are_no_new_beginning(open_checkpointer, tmp_path):
    open_checkpointer().save_steps(1)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "broken-1")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        open_checkpointer().restored_step()
