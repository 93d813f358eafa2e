"""Reading formats: what becomes a record, what is a bad line, and damaged files."""

import contextlib
import gzip
import io
import json
import tracemalloc

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from jaxllm.data import formats
from jaxllm.data.formats import UNREADABLE, is_known, read_records
from jaxllm.data.records import BadLine, Record


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows, **options):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def read(data, file, marked=False):
    return list(read_records(io.BytesIO(data), file, marked))


def texts(data, file):
    return [record.fields["text"] for record in read(data, file)]


PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_lines_of_json_are_records_however_they_are_compressed(compression, suffix):
    rows = [{"text": "床前\n"}, {"prompt": "a", "messages": [{"role": "user"}]}, {}]
    data = "\r\n".join(json.dumps(row) for row in rows).encode()
    file = "a" + suffix + compression
    expected = [Record(row, file, line) for line, row in enumerate(rows, start=1)]
    assert read(PACK[compression](data), file) == expected


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_parts_one_after_the_other_are_one_file(compression):
    pack = PACK[compression]
    data = pack(b'{"text": "one"}\n{"te') + pack(b'xt": "two"}')
    assert texts(data, "a.jsonl" + compression) == ["one", "two"]


BAD = {
    b"{": "not JSON",
    b'{"a": ' + b"9" * 5000 + b"}": "not JSON",
    b'["text"]': "not an object but list",
    b"null": "not an object but NoneType",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b"": "empty line",
    b" \t\r": "empty line",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
}


def test_bad_lines_have_their_place_and_reason():
    lines = [b'{"text": "good"}', *BAD, b'{"text": "also good"}']
    first, *bad, last = read(b"\n".join(lines), "bad.jsonl")
    assert first == Record({"text": "good"}, "bad.jsonl", 1)
    assert last == Record({"text": "also good"}, "bad.jsonl", len(lines))
    for number, (line, reason) in enumerate(zip(bad, BAD.values(), strict=True), start=2):
        assert isinstance(line, BadLine)
        assert (line.file, line.line) == ("bad.jsonl", number)
        assert reason in line.reason


@pytest.mark.parametrize("end", [b"\n", b""])
def test_only_a_line_over_the_limit_is_too_long(monkeypatch, end):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    longest = b'{"text": "' + b"a" * ((1 << 20) - 12) + b'"}'
    assert len(longest) == 1 << 20
    good, bad, also_good = read(longest + b"\n \n" + longest + end, "a.jsonl")
    assert isinstance(good, Record) and isinstance(also_good, Record)
    good, bad = read(b"{}\n " + longest + end, "a.jsonl")
    assert bad == BadLine("a.jsonl", 2, "longer than 1 MiB")
    bad, good = read(b"x" * (5 << 20) + b'\n{"text": "a"}' + end, "a.jsonl")
    assert (bad.line, good) == (1, Record({"text": "a"}, "a.jsonl", 2))


class Endless(io.RawIOBase):
    """So many times the same byte, made as they are read."""

    def __init__(self, byte, size):
        self.byte, self.left = byte, size

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(len(buffer), self.left)
        buffer[:size] = self.byte * size
        self.left -= size
        return size


@pytest.mark.parametrize(("file", "limit"), [("a.jsonl", 40), ("a.txt", 10)])
def test_memory_stays_bounded_in_a_line_without_end(file, limit):
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_records(Endless(b"x", 100 << 20), file, False))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == (1 if file == "a.jsonl" else 100)
    assert peak < limit << 20


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b" "))), st.data())
def test_random_bytes_lose_no_good_line_around_them(noise, data):
    good = data.draw(st.lists(st.just(None), max_size=3))
    lines = data.draw(st.permutations([*noise, *good]))
    expected = [number for number, line in enumerate(lines, start=1) if line is None]
    written = b"".join((b'{"text": "good"}' if line is None else line) + b"\n" for line in lines)
    records = read(written, "a.jsonl")
    assert [record.line for record in records] == list(range(1, len(lines) + 1))
    for number in expected:
        assert records[number - 1] == Record({"text": "good"}, "a.jsonl", number)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.sampled_from([".gz", ".zst", ""]), st.booleans())
def test_random_bytes_raise_nothing_but_what_is_named(noise, compression, packed):
    data = PACK[compression](noise)[: -1 if noise[:1] < b"\x80" else None] if packed else noise
    for suffix in (".jsonl", ".txt"):
        try:
            read(data, "a" + suffix + compression)
        except UNREADABLE:
            assert compression


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_parquet_file_raises_nothing_but_what_is_named(data):
    whole = bytearray(parquet([{"text": f"text {i}"} for i in range(9)], write_page_checksum=True))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(UNREADABLE):
        read(bytes(whole[: data.draw(st.integers(0, len(whole)))]), "a.parquet")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "plain", "empty", "tail"])
def test_a_damaged_compressed_file_is_not_taken_for_a_whole_one(compression, damage):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(2000))
    whole = PACK[compression](lines)
    data = {
        "cut": whole[:-5],
        "plain": lines,
        "empty": b"",
        "tail": whole + b"tail",
    }[damage]
    with pytest.raises(UNREADABLE):
        read(data, "a.jsonl" + compression)


# As the command-line tool writes it, with a checksum (pyarrow writes none): "one", "two".
ZSTD_WITH_CHECKSUM = bytes.fromhex(
    "28b52ffd2420e50000b07b2274657874223a20226f6e65227d0a74776f227d0a0100669b4b6f2d2a9f"
)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_checksum_is_checked(compression):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    whole = gzip.compress(lines, 0) if compression == ".gz" else ZSTD_WITH_CHECKSUM
    assert texts(whole, "a.jsonl" + compression) == ["one", "two"]
    assert whole.count(b"one") == 1
    with pytest.raises(UNREADABLE):
        read(whole.replace(b"one", b"ONE"), "a.jsonl" + compression)


@pytest.mark.parametrize("compression", PACK)
def test_a_short_txt_file_is_one_record(compression):
    data = PACK[compression](b"\xef\xbb\xbffirst\r\n\r\nsecond")
    file = "a.txt" + compression
    assert read(data, file) == [Record({"text": "first\r\n\r\nsecond"}, file, 1)]
    assert read(PACK[compression](b""), file) == [Record({"text": ""}, file, 1)]


def test_a_long_txt_file_is_cut_at_blank_lines():
    paragraph = "word " * 4000 + "\n\n"
    pieces = read((paragraph * 10).encode(), "a.txt")
    assert [piece.line for piece in pieces] == [1, 9, 17]
    assert [piece.fields["text"] for piece in pieces] == [
        paragraph * 4,
        paragraph * 4,
        paragraph * 2,
    ]
    lines = "a line without a blank one\n" * 100_000
    pieces = read(lines.encode(), "a.txt")
    assert len(pieces) == 3
    assert all(piece.fields["text"].endswith("\n") for piece in pieces)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["a", "é", "床", "😀", "\n", "\n\n", "\ufeff", " "]), max_size=60),
    st.integers(4, 20),
)
def test_the_pieces_of_a_text_are_the_text(parts, piece_bytes):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_PIECE_BYTES", piece_bytes // 2)
        patch.setattr(formats, "_LONGEST_CHUNK", piece_bytes)
        pieces = read(text.encode(), "a.txt")
    assert "".join(piece.fields["text"] for piece in pieces) == text.removeprefix("\ufeff")
    position = 0
    for piece in pieces:
        read_before = ("\ufeff" if text.startswith("\ufeff") and position else "") + text[:position]
        assert piece.line == 1 + text[: len(read_before)].count("\n")
        position += len(piece.fields["text"])


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["a", "床", "\n", "\n\n", "<s>a\n\nb</s>", "<s>床</s>"]), max_size=60),
    st.integers(4, 20),
)
def test_a_marked_text_is_not_cut_within_a_span(parts, piece_bytes):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_PIECE_BYTES", piece_bytes // 2)
        patch.setattr(formats, "_LONGEST_CHUNK", piece_bytes)
        pieces = [piece.fields["text"] for piece in read(text.encode(), "a.txt", marked=True)]
    assert "".join(pieces) == text
    assert all(piece.count("<s>") == piece.count("</s>") for piece in pieces)


def test_long_marked_poems_with_blank_lines_stay_whole():
    poems = [
        f"<s>{title}\n\n" + "床前明月光，\n\n疑是地上霜。\n" * 3000 + "</s>\n" for title in "甲乙丙"
    ]
    pieces = [piece.fields["text"] for piece in read("".join(poems).encode(), "a.txt", marked=True)]
    assert "".join(pieces) == "".join(poems)
    assert all(piece.count("<s>") == piece.count("</s>") for piece in pieces)


def test_a_span_that_never_ends_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    pieces = read(b"<s>" + b"a line\n" * 500_000, "a.txt", marked=True)
    assert len(pieces) == 4


def test_what_is_not_utf_8_is_one_bad_piece():
    paragraph = b"word " * 20_000 + b"\n\n"
    good, bad, also_good = read(paragraph + b"\xff" + paragraph + paragraph, "a.txt")
    assert bad == BadLine("a.txt", 3, "not UTF-8 at byte 0")
    assert good.fields == also_good.fields
    assert read(b"abc\xe5", "a.txt") == [BadLine("a.txt", 1, "not UTF-8 at byte 3")]


ROWS = [
    {"text": "床", "label": 1, "score": 0.5, "messages": [{"role": "user", "content": "a"}]},
    {"text": None, "label": 2, "score": None, "messages": []},
]


def test_rows_of_parquet_are_records_of_plain_values():
    file = "a.parquet"
    assert read(parquet(ROWS), file) == [Record(row, file, n) for n, row in enumerate(ROWS, 1)]


def test_rows_of_parquet_are_in_order_over_groups_and_batches():
    rows = [{"text": str(i)} for i in range(1000)]
    records = read(parquet(rows, row_group_size=300), "a.parquet")
    assert records == [Record(row, "a.parquet", n) for n, row in enumerate(rows, 1)]


def test_a_string_of_parquet_that_is_not_utf_8_is_one_bad_line():
    column = pa.array([b"good", b"a\xff", b"also good"]).view(pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": column}), sink)
    good, bad, also_good = read(sink.getvalue(), "a.parquet")
    assert bad == BadLine("a.parquet", 2, "not UTF-8 at byte 1")
    assert [good.fields["text"], also_good.fields["text"]] == ["good", "also good"]


def test_a_value_that_python_cannot_hold_costs_its_field_alone():
    columns = {
        "text": pa.array(["one", "two"]),
        "far": pa.array([0, 2**30], pa.int32()).view(pa.date32()),
        "fine": pa.array([1, 1_000_000_000], pa.int64()).view(pa.timestamp("ns")),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    first, second = read(sink.getvalue(), "a.parquet")
    assert first.fields["text"] == "one"
    assert second.fields["text"] == "two"
    assert "far" in first.fields
    assert "far" not in second.fields


def test_a_checksum_of_parquet_is_checked():
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    whole = parquet([{"text": "one"}], write_page_checksum=True, **options)
    assert whole.count(b"one") == 1
    with pytest.raises(UNREADABLE):
        read(whole.replace(b"one", b"ONE"), "a.parquet")


@pytest.mark.parametrize(
    "data",
    [
        parquet(ROWS)[:-7],
        parquet(ROWS).replace(b"label", b"labe\xff"),
        b'{"text": "a"}',
        b"",
    ],
)
def test_what_is_no_parquet_file_is_not_read(data):
    with pytest.raises(UNREADABLE):
        read(data, "a.parquet")


def test_known_formats():
    for file in ("a.jsonl", "b/a.v2.txt.gz", "a.ndjson.zst", "s3://b/a.parquet", "A.TXT"):
        assert is_known(file)
    assert is_known("https://host/a.jsonl.gz?download=true")
    for file in ("a", "a.json", "a.gz", "a.parquet.gz", "jsonl", "a.jsonl.xz", "a.jsonl.gz.gz", ""):
        assert not is_known(file)
