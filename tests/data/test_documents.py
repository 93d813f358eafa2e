"""Reading sources: what becomes a document, what is set aside, and what stops the run."""

import json

import pytest

from jaxllm.data.cleaning import NO_CLEANING, Cleaner, CleaningConfig
from jaxllm.data.documents import RejectedLines, read_documents, split_spans
from jaxllm.data.selection import parse_sources
from jaxllm.errors import UserError


def texts(path, parse_special_tokens=True, max_bad_fraction=1.0, rejected=None):
    sources = parse_sources(str(path), "data.train", parse_special_tokens)
    documents = read_documents(sources, Cleaner(NO_CLEANING), max_bad_fraction, rejected)
    return [document.text for document in documents]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_spans():
    assert split_spans("plain") == ["plain"]
    assert split_spans("<s>one</s>") == ["one"]
    assert split_spans("<s>床前</s><s>明月\n光</s> \n<s> x </s>") == ["床前", "明月\n光", " x "]
    assert split_spans("<s></s><s>a</s>") == ["a"]
    for wrong in ("<s>a", "a</s>", "</s>a<s>", "<s>a<s>b</s>", "<s>a</s>b", "a<s>b</s>"):
        with pytest.raises(ValueError):
            split_spans(wrong)


def test_each_span_is_a_document_unless_told_otherwise(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "<s>a</s><s>b</s>"}, {"text": "c"}])
    assert texts(path) == ["a", "b", "c"]
    assert texts(path, parse_special_tokens=False) == ["<s>a</s><s>b</s>", "c"]


def test_a_txt_file_is_a_document_and_globs_are_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second\nfile")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert texts(tmp_path / "*.txt") == ["first", "second\nfile"]
    assert texts(f"{tmp_path}/b.txt, {tmp_path}/a.txt") == ["second\nfile", "first"]


def test_copies_of_a_text_share_a_group(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    sources = parse_sources(str(path), "data.train", True)
    groups = [document.group for document in read_documents(sources, Cleaner(NO_CLEANING))]
    assert groups[0] == groups[2] != groups[1]


BAD = {
    b"{": "not JSON",
    b'{"text": 1}': "`text` is not a string but int",
    b'{"words": "a"}': "no field `text`",
    b'["text"]': "not an object but list",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "  "}': "empty text",
    b'{"text": "<s> </s>"}': "empty text",
    b'{"text": "<s>a"}': "do not alternate",
    b"": "empty line",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
}


def test_bad_lines_are_set_aside_with_their_place_and_reason(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"\n".join(BAD) + b'\n{"text": "also good"}')
    with RejectedLines(tmp_path / "rejected.jsonl") as rejected:
        assert texts(path, rejected=rejected) == ["good", "also good"]
    records = [json.loads(line) for line in rejected.path.read_text().splitlines()]
    assert rejected.bad == len(BAD)
    assert [record["line"] for record in records] == list(range(2, len(BAD) + 2))
    for record, reason in zip(records, BAD.values(), strict=True):
        assert record["file"] == str(path)
        assert reason in record["reason"]


def test_too_many_bad_lines_stop_the_run_and_few_do_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 7 + "broken\n" * 3)
    with RejectedLines(tmp_path / "rejected.jsonl") as rejected:
        assert len(texts(path, max_bad_fraction=0.3, rejected=rejected)) == 7
    with (
        RejectedLines(tmp_path / "rejected.jsonl") as rejected,
        pytest.raises(UserError, match=r"3 of the 10 lines.*max_bad_fraction=0.01.*a\.jsonl:8"),
    ):
        texts(path, max_bad_fraction=0.01, rejected=rejected)
    assert rejected.path.exists()


def test_a_large_bad_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("broken\n" * 5000)
    with (
        RejectedLines(tmp_path / "rejected.jsonl") as rejected,
        pytest.raises(UserError, match="1000 of the 1000 lines"),
    ):
        texts(path, max_bad_fraction=0.01, rejected=rejected)


def test_the_list_of_an_earlier_reading_is_removed(tmp_path):
    (tmp_path / "rejected.jsonl").write_text("old")
    with RejectedLines(tmp_path / "rejected.jsonl"):
        pass
    assert not (tmp_path / "rejected.jsonl").exists()


SEED_RECORDS = [
    {
        "text": "<s>静夜思\n李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。</s>"
        "<s>登鹳雀楼\n王之涣\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。</s>"
    },
    {
        "text": "<s>子曰：“学而时习之，不亦说乎？有朋自远方来，不亦乐乎？”</s>\n"
        "<s>北冥有鱼，其名为鲲。鲲之大，不知其几千里也。</s>\n"
        "<s>A translation follows: in the northern sea there is a fish.</s>"
    },
    {"text": "这一条没有标记，所以整条是一篇文章。\n\n它有两段。"},
]


def test_chinese_poems_and_prose_with_several_spans_in_a_record(tmp_path):
    path = tmp_path / "seed.jsonl"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in SEED_RECORDS)
    path.write_text("".join(lines), encoding="utf-8")
    found = texts(path)
    assert [text.splitlines()[0] for text in found] == [
        "静夜思",
        "登鹳雀楼",
        "子曰：“学而时习之，不亦说乎？有朋自远方来，不亦乐乎？”",
        "北冥有鱼，其名为鲲。鲲之大，不知其几千里也。",
        "A translation follows: in the northern sea there is a fish.",
        "这一条没有标记，所以整条是一篇文章。",
    ]
    assert found[1].endswith("更上一层楼。")
    assert found[5] == SEED_RECORDS[2]["text"]
    assert texts(path, parse_special_tokens=False) == [record["text"] for record in SEED_RECORDS]
    sources = parse_sources(str(path), "data.train", True)
    cleaned = [d.text for d in read_documents(sources, Cleaner(CleaningConfig()))]
    assert cleaned == found  # nothing in them needs cleaning
    groups = {document.group for document in read_documents(sources, Cleaner(NO_CLEANING))}
    assert len(groups) == 6  # spans are split, and compared, one by one
