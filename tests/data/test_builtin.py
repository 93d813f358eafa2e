"""The grammar of built-in sources, and what all of them have in common."""

import itertools
import json
from pathlib import Path

import pytest

from jaxllm.data import builtin
from jaxllm.data.builtin import PYDOCS, builtin_source
from jaxllm.data.records import Record, Source
from jaxllm.data.tasks import TASKS
from jaxllm.errors import UserError


@pytest.fixture
def few_items(monkeypatch):
    items = tuple((f"group {n // 2}", {"text": str(n)}) for n in range(20))
    monkeypatch.setitem(builtin.PYDOCS, "pydocs", lambda: items)


def source(entry):
    return builtin_source(entry, "data.train")


def texts(entry):
    return [record.fields["text"] for record in source(entry).records()]


@pytest.mark.parametrize("name", [*PYDOCS, *TASKS])
def test_every_source_yields_numbered_records_under_its_entry(name):
    entry = f"builtin:{name}"
    made = source(entry)
    assert isinstance(made, Source)
    assert made.name == entry
    assert not made.marked
    for number, record in enumerate(itertools.islice(made.records(), 5), start=1):
        assert isinstance(record, Record)
        assert (record.file, record.line) == (entry, number)
        assert all(isinstance(value, str | int | list) for value in record.fields.values())


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        ("builtin:sorting", 10_000),
        ("builtin:sorting:7", 7),
        ("builtin:sorting:2k:3", 2000),
        ("builtin:sorting:10k-12k", 2000),
        ("builtin:sorting:995-1k:3", 5),
    ],
)
def test_a_size_is_the_number_of_records(entry, size):
    assert sum(1 for _ in source(entry).records()) == size


def test_millions_are_written_with_m():
    assert source("builtin:copying:3m").part == range(3_000_000)
    assert source("builtin:copying:1m-3m").part == range(1_000_000, 3_000_000)


def test_a_seed_chooses_other_records():
    assert texts("builtin:countdown:20") == texts("builtin:countdown:20:0")
    assert texts("builtin:countdown:20") != texts("builtin:countdown:20:1")


@pytest.mark.parametrize("name", ["sorting", "pydocs"])
def test_ranges_divide_what_a_size_takes(few_items, name):
    whole = texts(f"builtin:{name}:20:3")
    parts = [texts(f"builtin:{name}:{part}:3") for part in ("0-12", "12-15", "15-20")]
    assert [len(part) for part in parts] == [12, 3, 5]
    assert sorted(text for part in parts for text in part) == sorted(whole)
    assert parts[0] == texts(f"builtin:{name}:12:3")


def test_what_is_made_of_files_is_complete_and_in_order(few_items):
    assert texts("builtin:pydocs") == [str(n) for n in range(20)]
    groups = [record.group for record in source("builtin:pydocs").records()]
    assert groups[:4] == ["group 0", "group 0", "group 1", "group 1"]


def test_a_size_takes_a_random_choice_in_the_same_order(few_items):
    chosen = [int(text) for text in texts("builtin:pydocs:8")]
    assert len(chosen) == 8
    assert chosen == sorted(chosen) != list(range(8))
    assert {int(text) for text in texts("builtin:pydocs:5")} < set(chosen)
    assert texts("builtin:pydocs:8:1") != texts("builtin:pydocs:8")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("builtin:sortin", "no such source.*builtin:copying.* Did you mean builtin:sorting?"),
        ("builtin:", "there is no such source; known are builtin:pydocs, .*builtin:sorting.$"),
        ("builtin:sorting:0", "the size '0' must be a whole number from 1, as .* or a range"),
        ("builtin:sorting:10k-10k", "the size '10k-10k' must .* end is larger than its beginning"),
        ("builtin:sorting:12k-10k", "the size '12k-10k' must"),
        ("builtin:sorting:10-", "the size '10-' must"),
        ("builtin:sorting:1-2-3", "the size '1-2-3' must"),
        ("builtin:sorting:", "the size '' must"),
        ("builtin:sorting:-5", "the size '-5' must"),
        ("builtin:sorting:1.5k", "the size '1.5k' must"),
        ("builtin:sorting:10K", "the size '10K' must"),
        ("builtin:sorting:٣", "the size '٣' must"),
        ("builtin:sorting:10k:x", "the seed 'x' must be a whole number from 0"),
        ("builtin:sorting:10k:-1", "the seed '-1' must"),
        ("builtin:sorting:10k:1:2", "write it as builtin:sorting:SIZE:SEED"),
        ("builtin:arithmetic:3m", "only 2,019,900 records"),
        ("builtin:arithmetic:2m-3m", "only 2,019,900 records"),
        ("builtin:pydocs:21", "only 20 records"),
        ("builtin:pydocs:20-21", "only 20 records"),
    ],
)
def test_a_wrong_entry_is_told_with_its_field(few_items, entry, message):
    with pytest.raises(UserError, match=rf"^config\.data\.train: {entry}: .*{message}"):
        source(entry)


@pytest.mark.parametrize("name", ["sorting", "pydocs"])
def test_a_fingerprint_tells_size_and_seed_however_they_are_written(few_items, name):
    def fingerprint(options):
        return source(f"builtin:{name}{options}").fingerprint()

    assert fingerprint(":10") == fingerprint(":10") == fingerprint(":10:0")
    assert fingerprint(":10") == fingerprint(":0-10")
    different = ("", ":10", ":11", ":10:1", ":1-10", ":1-11")
    assert len({fingerprint(options) for options in different}) == len(different)


def test_a_fingerprint_is_of_the_size_not_of_its_spelling():
    first, second = (source(f"builtin:copying{size}") for size in ("", ":10k"))
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != source("builtin:sorting:10k").fingerprint()


@pytest.mark.parametrize(
    ("module", "version"), [("builtin", "TASKS_VERSION"), ("pydocs", "PYDOCS_VERSION")]
)
def test_a_new_version_of_the_maker_is_another_fingerprint(monkeypatch, module, version):
    made = source("builtin:sorting" if module == "builtin" else "builtin:pydocs_classify")
    before = made.fingerprint()
    monkeypatch.setattr(f"jaxllm.data.{module}.{version}", 1000)
    assert made.fingerprint() != before


def test_the_documentation_lists_every_source_and_shows_the_first_record_of_each_task():
    page = (Path(__file__).parents[2] / "docs" / "builtin.md").read_text(encoding="utf-8")
    for name in [*PYDOCS, *TASKS]:
        assert f"| `{name}` |" in page
    for task in TASKS.values():
        assert f"\n{json.dumps(next(task.records(range(1), 0)))}\n" in page
