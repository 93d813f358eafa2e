"""Which of a teacher's answers are kept, and as which records."""

import pytest

from jaxllm.data.cleaning import NO_CLEANING, Cleaner
from jaxllm.data.conversations import ConversationReader
from jaxllm.data.records import Record
from jaxllm.inference.teacher import Answer
from jaxllm.rollouts.answered import COUNTS, Selection, record_of

ANSWERS = [
    Answer("a", "stop", 1),
    Answer("b", "length", 2),
    Answer(" ", "stop", None),
    Answer("a", "stop", 4),
    Answer("c", "stop", 8),
    Answer("d", "stop", 16),
]
REWARDS = [0.0, 1.0, 5.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("options", "places", "left_out"),
    [
        ({}, [0, 1, 4, 5], {}),
        ({"keep_cut_off": False}, [0, 4, 5], {"cut_off": 1}),
        ({"least": 1.0}, [1, 4, 5], {"rejected": 1}),
        ({"least": 1.0, "keep": "first"}, [1], {"rejected": 1, "surplus": 2}),
        ({"keep": "best"}, [4], {"surplus": 3}),
        ({"least": 9.0, "keep": "best"}, [], {"rejected": 4}),
    ],
)
def test_each_answer_is_kept_or_left_out_for_one_reason(options, places, left_out):
    kept, counts = Selection(**options)(ANSWERS, REWARDS)
    assert kept == places
    assert {name: counts[name] for name in COUNTS} == dict.fromkeys(COUNTS, 0) | {
        "responses": 6,
        "kept": len(places),
        "empty": 1,
        "duplicates": 1,
        "tokens": 31,
        **left_out,
    }


def test_without_rewards_all_is_kept_that_is_new():
    assert Selection()(ANSWERS, None)[0] == [0, 1, 4, 5]


def learnt(record, reasoning="gsm8k"):
    reader = ConversationReader(reasoning=reasoning)
    (passage,) = reader(Record(record, "file", 1), False, Cleaner(NO_CLEANING))
    return passage.text


@pytest.mark.parametrize("reasoning", ["gsm8k", "think", "leave_out"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "asked", "response": "wrong", "text": "wrong", "chosen": "wrong"},
        {"question": "asked", "reasoning": "wrong", "answer": "right?"},
        {"instruction": "asked", "output": "wrong"},
        {"messages": [{"role": "user", "content": "asked"}], "label": 1},
    ],
)
def test_a_record_is_learnt_by_its_answer_and_nothing_is_lost(fields, reasoning):
    asked = [{"role": "user", "content": "asked"}]
    record = record_of(fields, asked, ANSWERS[0], {"teacher": "t"})
    assert '"asked"' in learnt(record, reasoning)
    assert '{"role": "assistant", "content": "a"}' in learnt(record, reasoning)
    assert "wrong" not in learnt(record, reasoning)
    assert all(record.get(name) == v or record["record"][name] == v for name, v in fields.items())


def test_a_longer_conversation_stays_one():
    said = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    ]
    record = record_of({"messages": said, "answer": "4"}, said, ANSWERS[0], {"sample": 0})
    assert record["messages"] == [*said, {"role": "assistant", "content": "a"}]
    assert (record["answer"], record["sample"]) == ("4", 0)
    assert "response" not in record
    assert '"content": "a"' in learnt(record)


def test_what_another_teacher_was_is_kept_apart():
    fields = {"prompt": "p", "teacher": "first", "answer": "4", "record": {"x": 1}}
    messages = [{"role": "user", "content": "p"}]
    record = record_of(fields, messages, ANSWERS[0], {"teacher": "second"})
    assert record == {
        "prompt": "p",
        "response": "a",
        "answer": "4",
        "teacher": "second",
        "record": {"teacher": "first", "record": {"x": 1}},
    }
