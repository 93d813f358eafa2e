"""Tasks that a configuration names: their names, their records, and what is wrong with them."""

import json

import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation.items import Item
from jaxllm.evaluation.tasks import spread

CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}


def test_a_task_is_called_by_its_file_or_by_the_name_it_is_given(prepared, jsonl):
    one, other = jsonl("one.extra", CHOICE), jsonl("other", {"prompt": "1", "answer": 2})
    found = prepared(tasks=f"{one}, second={other},builtin:sorting:5,s7=builtin:sorting:5:7")
    assert [each.task.name for each in found] == ["one", "second", "sorting", "s7"]
    assert [len(each.task.items) for each in found] == [1, 1, 5, 5]
    assert [each.task.kind.measure for each in found] == ["choice", "answer", "answer", "answer"]


def test_a_pattern_is_a_task_for_each_file_unless_it_is_named(prepared, jsonl, tmp_path):
    jsonl("b", CHOICE), jsonl("a", CHOICE)
    pattern = f"{tmp_path}/*.jsonl"
    assert [each.task.name for each in prepared(tasks=pattern)] == ["a", "b"]
    (both,) = prepared(tasks=f"both={pattern}")
    assert (both.task.name, len(both.task.items)) == ("both", 2)


def test_two_tasks_of_one_name_are_told(prepared):
    with pytest.raises(UserError, match="two tasks are called sorting; write NAME= before"):
        prepared(tasks="builtin:sorting:5,builtin:sorting:9")


def test_items_are_spread_over_the_file(prepared, jsonl):
    items = [Item(str(n), "") for n in range(10)]
    assert [item.prompt for item in spread(items, 4)] == ["0", "2", "5", "7"]
    assert spread(items, 0) == spread(items, 10) == spread(items, 99) == tuple(items)
    path = jsonl("many", *(CHOICE | {"query": str(n)} for n in range(10)))
    (found,) = prepared(tasks=path, max_items=4, most_shots=9)
    assert [item.line for item in found.task.items] == [1, 3, 6, 8]
    assert all(len(examples) == 9 for examples in found.examples)  # of all records


def test_records_of_no_known_kind_are_told(prepared, jsonl):
    path = jsonl("texts", {"text": "a", "label": 1})
    with pytest.raises(UserError, match=r"texts.jsonl:1: is of no known kind .* text, label\); a"):
        prepared(tasks=path)


def test_countdown_has_no_answer_to_match(prepared):
    with pytest.raises(UserError, match="is of no known kind"):
        prepared(tasks="builtin:countdown:5")


def test_an_empty_file_and_one_that_is_not_there_are_told(prepared, jsonl):
    with pytest.raises(UserError, match="there are no records in"):
        prepared(tasks=jsonl("empty"))
    with pytest.raises(UserError, match=r"config.tasks: .* there is no such file"):
        prepared(tasks="nowhere.jsonl")


def test_bad_records_are_set_aside_as_far_as_they_may_be(prepared, jsonl, tmp_path):
    records = [CHOICE] * 8 + [CHOICE | {"gold": 2}, {"query": "a", "choices": ["b", "c"]}]
    path = jsonl("some", *records)
    (found,) = prepared(tasks=path, max_bad_fraction=0.2)
    assert len(found.task.items) == 8
    rejected = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == [9, 10]
    with pytest.raises(UserError, match=r"2 of the 10 lines .*some.jsonl:9 \(`gold` is 2, and"):
        prepared(tasks=path, max_bad_fraction=0.1)
    with pytest.raises(UserError, match=r"some2.jsonl:2 \(no field `gold`\)"):
        prepared(tasks=jsonl("some2", CHOICE, records[-1]))


def test_a_line_that_is_no_json_is_a_bad_one(prepared, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(f"oops\n{json.dumps(CHOICE)}\n")
    (found,) = prepared(tasks=str(path), max_bad_fraction=0.5)
    assert [item.line for item in found.task.items] == [2]


def test_examples_come_from_the_source_of_the_tasks_name_or_from_that_of_none(prepared, jsonl):
    def numbered(name, start):
        return jsonl(name, *(CHOICE | {"query": f"{name}{n}"} for n in range(start, start + 5)))

    one, two, shots, own = (numbered(name, 0) for name in ("one", "two", "shots", "own"))
    found = prepared(tasks=f"{one},{two}", fewshot_source=f"{shots},two={own}", most_shots=3)
    drawn = [{e.prompt[:3] for examples in each.examples for e in examples} for each in found]
    assert drawn == [{"sho"}, {"own"}]


def test_a_source_of_examples_for_a_task_that_there_is_not_is_told(prepared, jsonl):
    one, other = jsonl("one", CHOICE), jsonl("other", CHOICE | {"query": "z"})
    with pytest.raises(UserError, match=r"config.fewshot_source: onne=.* there are one\.$"):
        prepared(tasks=one, fewshot_source=f"onne={other}", most_shots=1)
    (found,) = prepared(tasks=one, fewshot_source=f"one={other}", most_shots=1)
    assert found.examples[0][0].prompt == "z"


def test_examples_of_another_kind_are_told(prepared, jsonl):
    with pytest.raises(UserError, match=r"config.fewshot_source: .* not of the kind of one"):
        prepared(tasks=jsonl("one", CHOICE), fewshot_source="builtin:sorting:5", most_shots=1)
