"""Records become conversations, or are set aside with a reason that helps."""

import json

import pytest

from jaxllm.data.cleaning import NO_CLEANING, Cleaner, CleaningConfig
from jaxllm.data.conversations import ConversationReader
from jaxllm.data.records import Record

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(fields, joint="", marked=False, cleaning=NO_CLEANING, group="", reasoning="gsm8k"):
    record = Record(fields, "file.jsonl", 1, group)
    return ConversationReader(joint, reasoning)(record, marked, Cleaner(cleaning))


def only(fields, **options):
    [passage] = read(fields, **options)
    return json.loads(passage.text)


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": None, "output": "A", "id": 7},
        {"prompt": "Q", "response": "A", "text": "Q A"},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER, USER]},  # what follows the last answer teaches nothing
        {"messages": [USER, {**ANSWER, "tool_calls": None}]},
    ],
)
def test_every_form_is_the_same_conversation(fields):
    assert only(fields) == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("gsm8k", "2 + 2 = 4\n#### 4"),
        ("think", "<think>2 + 2 = 4</think>4"),
        ("leave_out", "4"),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"question": "Q", "reasoning": "2 + 2 = 4", "answer": "4"},
        {"question": "Q", "reasoning": "2 + 2 = 4", "answer": 4},
        {"question": "Q", "answer": "2 + 2 = 4\n#### 4"},
    ],
)
def test_reasoning_is_written_as_it_is_asked_for(fields, reasoning, expected):
    wanted = {"messages": [USER, {"role": "assistant", "content": expected}]}
    assert only(fields, reasoning=reasoning) == wanted


def test_an_answer_without_reasoning_stays_alone():
    for reasoning in ("gsm8k", "think", "leave_out"):
        assert only({"question": "Q", "answer": "A"}, reasoning=reasoning) == {
            "messages": [USER, ANSWER]
        }


def test_how_to_reason_may_be_chosen_where_there_is_a_response_too():
    fields = {"prompt": "Q", "response": "A", "question": "Q", "reasoning": "R", "answer": "1"}
    assert only(fields) == {"messages": [USER, ANSWER]}
    thought = only(fields, reasoning="think")["messages"][1]["content"]
    assert thought == "<think>R</think>1"


def test_a_question_with_choices_is_no_conversation():
    with pytest.raises(ValueError, match="no `instruction`"):
        read({"question": "Q", "choices": ["A", "B"], "answer": "A"})


@pytest.mark.parametrize(("joint", "expected"), [("", "Add:1 2"), ("\n", "Add:\n1 2")])
def test_instruction_and_input_are_joined(joint, expected):
    conversation = only({"instruction": "Add:", "input": "1 2", "output": "3"}, joint=joint)
    assert conversation["messages"][0]["content"] == expected


def test_what_a_tool_call_says_the_assistant_says():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    tools = '[{"name": "f"}]'
    messages = [USER, call, {"role": "tool", "content": ""}, ANSWER]
    conversation = only({"messages": messages, "tools": tools})
    roles = [message["role"] for message in conversation["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    said = conversation["messages"][1]
    assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert conversation["tools"] == [{"name": "f"}]


def test_text_is_read_as_documents():
    passages = read({"text": "<s>a</s><s>b</s>"}, marked=True)
    texts = [json.loads(passage.text) for passage in passages]
    assert texts == [{"text": "a"}, {"text": "b"}]


def test_messages_are_cleaned_each_for_itself():
    fields = {"prompt": "a\u200b\u00a0b \n", "response": '＂x＂  \n\n\n\n\n"y"'}
    cleaned = only(fields, cleaning=CleaningConfig(unicode="NFKC"))["messages"]
    assert [m["content"] for m in cleaned] == ["a b", '"x"\n\n\n"y"']


def test_answers_to_one_question_stay_together():
    groups = [read({"prompt": p, "response": r})[0].group for p, r in ("ab", "ac", "bb")]
    assert groups[0] == groups[1] != groups[2]
    assert read({"prompt": "a", "response": "b"}, group="g")[0].group == "g"


def nested(depth):
    return [nested(depth - 1)] if depth else []


def message(**fields):
    return {"messages": [{**USER, **fields}, ANSWER]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [ANSWER, USER]}, "begins with assistant"),
        ({"messages": [{"role": "system", "content": "S"}, ANSWER]}, "begins with assistant"),
        ({"messages": [{"role": "system", "content": "S"}]}, "begins with nobody"),
        ({"messages": [USER, ANSWER, {"role": "system", "content": "S"}]}, "system message stands"),
        (message(role="human"), "'human'; known are system, user, assistant, tool, tool_call"),
        (message(role=["user"]), "unknown"),
        ({"messages": [USER]}, "no answer"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, r"empty answer: messages\[1\]"),
        ({"prompt": "Q", "response": " \n"}, "empty answer"),
        ({"prompt": "", "response": "A"}, "empty message"),
        ({"messages": []}, "no list of messages"),
        ({"messages": "Q"}, "no list of messages"),
        ({"messages": ["Q"]}, r"messages\[0\] is not an object but str"),
        (message(content=None), r"messages\[0\].content` is missing"),
        (message(content=["Q"]), "not a string but list"),
        (message(content="\ud800"), "lone surrogate"),
        ({"instruction": "Q", "output": 3}, "`output` is not a string but int"),
        ({"instruction": "Q"}, r"no `instruction` and `output`, .* \(it has instruction\)"),
        ({}, "it has no field"),
        ({"text": " "}, "empty text"),
        ({"messages": [USER, {"role": "tool_call", "content": "f(x)"}]}, "no tool call"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "`tools` is not JSON"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "no list of objects"),
        ({"messages": [USER, ANSWER], "tools": "[" * 9999 + "]" * 9999}, "nested too deeply"),
        ({"messages": [USER, ANSWER], "tools": [{"a": nested(100)}]}, "nested too deeply"),
        ({"messages": [{**USER, "a": nested(900)}, ANSWER]}, "nested too deeply"),
        (
            {"messages": [USER, {"role": "tool_call", "content": '{"a":' * 9999}]},
            "no tool call",
        ),
        ({"messages": [USER, {**ANSWER, "raw": b"x"}]}, "JSON cannot write"),
        ({"messages": [USER, {**ANSWER, "tool_calls": ["f"]}]}, "tool_calls is no list of objects"),
        ({"messages": [USER, {**ANSWER, "tool_calls": 5}]}, "tool_calls is no list of objects"),
        ({"messages": [USER, {**ANSWER, "name": "\ud800"}]}, "lone surrogate"),
    ],
)
def test_what_cannot_be_used_is_told(fields, reason):
    with pytest.raises(ValueError, match=reason):
        read(fields, cleaning=CleaningConfig())
