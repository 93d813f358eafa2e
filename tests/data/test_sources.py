"""Sources: what an entry of the configuration names, files near and far, and fingerprints."""

import gzip
import json
import os
import uuid

import fsspec
import fsspec.implementations.memory
import pytest
from fsspec.registry import known_implementations

from jaxllm.data.records import BadLine, Record, Source
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError


def source(entry, marked=True):
    return make_source(str(entry), "data.train", marked)


def texts(entry):
    return [record.fields["text"] for record in source(entry).records()]


def write_lines(path, values):
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return path


@pytest.fixture
def bucket():
    """A folder of a file system that is not the local one."""
    file_system = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    file_system.mkdir(folder)
    yield f"memory:/{folder}"
    file_system.rm(folder, recursive=True)


def test_a_source_has_its_entry_for_a_name_and_is_marked_as_asked(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    for marked in (True, False):
        made = source(path, marked)
        assert isinstance(made, Source)
        assert (made.name, made.marked) == (str(path), marked)
    assert list(made.records()) == [Record({"text": "one"}, str(path), 1)]
    assert list(made.records()) == list(made.records())


def test_a_glob_takes_files_in_order_and_no_hidden_ones(tmp_path):
    (tmp_path / "b" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("b/c.jsonl", "a.jsonl", "b/.ipynb_checkpoints/c.jsonl", ".d.jsonl"):
        write_lines(tmp_path / name, [name])
    assert texts(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b/c.jsonl"]


def test_a_name_with_brackets_is_a_file_if_there_is_one(tmp_path):
    write_lines(tmp_path / "a[1].jsonl", ["brackets"])
    write_lines(tmp_path / "a1.jsonl", ["pattern"])
    assert texts(tmp_path / "a[1].jsonl") == ["brackets"]
    assert texts(tmp_path / "a[12].jsonl") == ["pattern"]


def test_paths_may_be_relative_or_begin_at_home(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(source("a.jsonl").records()) == [Record({"text": "one"}, "a.jsonl", 1)]
    assert texts("~/a.jsonl") == texts("~/*.jsonl") == ["one"]


def test_a_file_name_need_not_be_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "w") as file:
        file.write('{"text": "one"}')
    made = source(os.fsdecode(path))
    assert [record.fields["text"] for record in made.records()] == ["one"]
    assert made.fingerprint()


def test_remote_files_are_read_as_local_ones_are(tmp_path, bucket):
    contents = {
        "b.jsonl.gz": gzip.compress(b'{"text": "two"}\nbroken\n{"text": "three"}'),
        "a.txt": b"one",
        "deep/down/c.jsonl": b'{"text": "four"}',
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        with fsspec.open(f"{bucket}/{name}", "wb") as file:
            file.write(content)
    for pattern in ("a.txt", "*.*", "**/*.*", "deep/*/c.jsonl"):
        near, far = source(tmp_path / pattern), source(f"{bucket}/{pattern}")
        assert near.fingerprint() == far.fingerprint()
        assert [record[0] for record in near.records() if isinstance(record, Record)] == [
            record[0] for record in far.records() if isinstance(record, Record)
        ]
    (bad,) = (line for line in source(f"{bucket}/*").records() if isinstance(line, BadLine))
    assert bad.file.endswith("/b.jsonl.gz") and bad.file.startswith("memory://")
    assert list(source(bad.file).records())[1] == bad


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing.jsonl", r"data\.train: missing\.jsonl: there is no such file"),
        ("none*.jsonl", r"none\*\.jsonl: the pattern matches no file"),
        ("folder", r"folder: is a folder; name its files, as in folder/\*\.jsonl"),
        ("folder*", "the pattern matches no file"),
        ("a.json", r"a\.json: is of no known format \(\.jsonl, .*\.zst, and \.parquet\)"),
        ("*", r"data\.train: a\.json: is of no known format"),
        ("", "there is no such file|is a folder"),
        ("builtin:nothing", "there is no such source"),
        ("memory://nothing/a.jsonl", "there is no such file"),
        ("memory://nothing/*.jsonl", "the pattern matches no file"),
        ("nothing://bucket/a.jsonl", "data.train: nothing://.*Protocol not known: nothing"),
    ],
)
def test_a_wrong_source_is_named(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message) as error:
        source(entry)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    known = {"class": "no_such_package.FileSystem", "err": "Install bucketfs to read it"}
    monkeypatch.setitem(known_implementations, "bucket", known)
    with pytest.raises(UserError, match=r"bucket://a\.jsonl: .*missing: Install bucketfs"):
        source("bucket://a.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt.zst", ".parquet"])
def test_a_file_that_cannot_be_read_to_its_end_is_named(tmp_path, suffix):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(lines)[:-9])
    made = source(path)
    if suffix == ".jsonl":  # no line of it is JSON, but it can be read
        assert all(isinstance(line, BadLine) for line in made.records())
        return
    how_far = r"was read to line \d+ only" if suffix == ".jsonl.gz" else "cannot be read"
    with pytest.raises(UserError, match=rf"a{suffix}: {how_far} \(.+\): .*again") as error:
        list(made.records())
    assert "\n" not in str(error.value)


def test_a_file_removed_after_it_was_named_is_told(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    made = source(path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        list(made.records())
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        made.fingerprint()


def test_an_error_of_a_remote_file_system_is_told(bucket, monkeypatch):
    with fsspec.open(f"{bucket}/a.jsonl", "wb") as file:
        file.write(b"{}")
    made = source(f"{bucket}/a.jsonl")

    def fail(*args, **kwargs):
        raise RuntimeError("no\ncredentials.")

    for method in ("isfile", "_open", "size"):
        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, method, fail)
    with pytest.raises(UserError, match=r"data\.train: memory.*looked up: no credentials\.$"):
        source(f"{bucket}/a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(no credentials\)"):
        list(made.records())
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: no credentials\.$"):
        made.fingerprint()


def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    made = source(path)
    before = made.fingerprint()
    assert made.fingerprint() == before
    os.utime(path, (1, 1))  # a copy, or a checkout: its text is the same
    assert made.fingerprint() == before
    write_lines(path, ["two"])
    second = made.fingerprint()
    assert second != before
    path.rename(tmp_path / "b.jsonl")
    assert source(tmp_path / "b.jsonl").fingerprint() not in (before, second)


def test_any_byte_of_a_file_of_megabytes_changes_the_fingerprint(tmp_path, bucket):
    size = 3_500_000
    for folder in (str(tmp_path), bucket):
        seen = set()
        for place in (0, 1 << 20, (1 << 21) - 1, size - 1, None):
            content = bytearray(size)
            if place is not None:
                content[place] = 1
            with fsspec.open(f"{folder}/a.txt", "wb") as file:
                file.write(bytes(content))
            seen.add(source(f"{folder}/a.txt").fingerprint())
        assert len(seen) == 5
