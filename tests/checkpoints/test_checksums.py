"""Checksums of a checkpoint: any damage to any of its files is found and named."""

import pytest

from jaxllm.checkpoints.checksums import damage, write_checksums

FILES = {"params/d/one": b"12345", "params/manifest": b"abc", "progress/d/two": b"", "_meta": b"m"}


@pytest.fixture
def checkpoint(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_a_whole_one_has_no_damage_and_one_without_checksums_is_taken_for_whole(checkpoint):
    assert damage(checkpoint) == ""
    write_checksums(checkpoint)
    assert damage(checkpoint) == ""


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("params/d/one", None, "params/d/one is missing"),
        ("params/d/one", b"1234", "params/d/one has 4 bytes, and had 5"),
        ("params/d/one", b"12346", "params/d/one has changed since it was written"),
        ("progress/d/two", b"x", "progress/d/two has 1 bytes, and had 0"),
    ],
)
def test_damage_is_found_by_one_reader(checkpoint, name, content, what, readers):
    write_checksums(checkpoint)
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    found = [damage(checkpoint, reader, readers) for reader in range(readers)]
    assert [each for each in found if each] == [what]


def test_checksums_that_are_no_json_are_damage(checkpoint):
    write_checksums(checkpoint)
    (checkpoint / "checksums.json").write_text("{")
    assert damage(checkpoint) == "checksums.json cannot be read"


def test_a_checkpoint_is_never_committed_without_them(open_checkpointer, tmp_path):
    checkpointer = open_checkpointer()
    for step in range(1, 6):
        checkpointer.begin_step(step)
        folder = tmp_path / "checkpoints" / str(step)
        while not folder.exists():
            pass
        assert (folder / "checksums.json").exists()
        assert damage(folder) == ""
