"""What comes in any order is kept at once, and written in order; a kill loses none of it."""

import json
from pathlib import Path

import pytest

from jaxllm.data.numbered import NumberedLines, OrderedLines
from jaxllm.errors import UserError


@pytest.fixture
def kept(tmp_path):
    return NumberedLines(tmp_path / "kept.jsonl")


@pytest.fixture
def ordered(kept, tmp_path):
    def make():
        return OrderedLines(tmp_path / "all.jsonl", kept, lambda n: [f"{n} {kept[n]['text']}"])

    return make


def lines(tmp_path):
    return (tmp_path / "all.jsonl").read_text().splitlines()


def test_values_are_found_again_in_order_of_their_numbers(kept, tmp_path):
    for number in (4, 0, 2):
        kept.append(number, {"text": f"ü{number}\n"})
    again = NumberedLines(tmp_path / "kept.jsonl")
    assert list(again) == [0, 2, 4]
    assert 4 in again
    assert 1 not in again
    assert [again[number]["text"] for number in again] == ["ü0\n", "ü2\n", "ü4\n"]


@pytest.mark.parametrize("half", [b'{"number": 7, "te', b'{"number": 7}'])
def test_a_half_written_line_is_cut(half, kept, tmp_path):
    path = tmp_path / "kept.jsonl"
    kept.append(0, {"text": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    again = NumberedLines(path)
    assert path.read_bytes() == whole
    again.append(1, {"text": "b"})
    assert [NumberedLines(path)[number]["text"] for number in (0, 1)] == ["a", "b"]


def test_another_damaged_line_is_told(kept, tmp_path):
    path = tmp_path / "kept.jsonl"
    kept.append(0, {})
    path.write_bytes(b"nothing\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"kept\.jsonl: line 1 is damaged"):
        NumberedLines(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
def test_a_full_disk_is_told_by_the_name_of_the_file(kept):
    kept.append(0, {})
    kept._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*kept\.jsonl'"):
        kept.append(1, {})
    assert list(kept) == [0]


def test_lines_are_written_as_soon_as_those_before_them_are(kept, ordered, tmp_path):
    def come(*numbers, passed=()):
        for number in numbers:
            kept.append(number, {"text": "a"})
        written.add(numbers, passed)
        return lines(tmp_path)

    written = ordered()
    assert come(1) == []
    assert come(0) == ["0 a", "1 a"]
    assert come(4) == ["0 a", "1 a"]
    assert come(3, passed=[2]) == ["0 a", "1 a", "3 a", "4 a"]
    assert come(6) == ["0 a", "1 a", "3 a", "4 a"]
    written.close()
    assert lines(tmp_path) == ["0 a", "1 a", "3 a", "4 a", "6 a"]


def test_what_comes_late_gets_its_place_and_nothing_is_lost_before(kept, ordered, tmp_path):
    for number in (0, 3):
        kept.append(number, {"text": "a"})
    written = ordered()
    assert lines(tmp_path) == ["0 a", "3 a"]
    for number in (1, 4):
        kept.append(number, {"text": "b"})
        written.add([number])
    assert lines(tmp_path) == ["0 a", "3 a", "4 b"]
    written.close()
    assert lines(tmp_path) == ["0 a", "1 b", "3 a", "4 b"]


def test_the_file_is_made_anew_of_what_is_kept(kept, ordered, tmp_path):
    kept.append(0, {"text": "a"})
    (tmp_path / "all.jsonl").write_text(json.dumps("cut off")[:4])
    ordered().close()
    assert lines(tmp_path) == ["0 a"]
