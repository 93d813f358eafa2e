"""The stage `score` with functions that judge responses; no model is needed."""

import json

import pytest


@pytest.fixture
def judged(command, json_lines, tmp_path):
    def run(records, **fields):
        given = {"texts": json_lines(records, "answers"), **fields}
        result = command("score", tmp_path / "scored", **given)
        path = tmp_path / "scored" / "scores.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return result, [json.loads(line) for line in lines]

    return run


def test_functions_judge_responses_as_they_stand(judged):
    records = [
        {"prompt": "2 + 2?", "response": "It is 4.", "answer": "4"},
        {"prompt": "3 + 4?", "responses": ["#### 7", " ", "8"], "answer": 7},
        {
            "messages": [{"role": "user", "content": "1?"}],
            "chosen": "1",
            "rejected": "2",
            "answer": 1,
        },
    ]
    result, lines = judged(records, rewards="numeric:2,length(limit=2):0.5")
    assert result.code == 0, result.err
    assert all({**line, **record} == line for line, record in zip(lines, records, strict=True))
    assert lines[0]["values"] == {"numeric": 1.0, "length": -1.0}
    assert lines[0]["reward"] == 1.5
    assert lines[1]["values"] == {"numeric": [1.0, 0.0, 0.0], "length": [-1.0, 0.0, 0.0]}
    assert lines[1]["rewards"] == [1.5, 0.0, 0.0]
    assert lines[2]["rewards"] == [2.0, 0.0]


def test_what_is_not_worth_so_much_is_left_out(judged):
    """As of traces those are whose answer is wrong."""
    records = [
        {"prompt": "2 + 2?", "response": "<think>2 and 2</think>4", "answer": "4"},
        {"prompt": "2 + 3?", "response": "<think>2 and 3</think>4", "answer": "5"},
        {"prompt": "3 + 4?", "responses": ["8", "7"], "answer": 7},
        {"prompt": "3 + 5?", "responses": ["7", "9"], "answer": 8},
    ]
    result, lines = judged(records, rewards="numeric", least="1")
    assert result.code == 0, result.err
    assert [line["prompt"] for line in lines] == ["2 + 2?", "3 + 4?"]
    assert lines[1]["rewards"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (
            {"prompt": "a", "responses": ["b", "c"]},
            {"rewards": "numeric"},
            "answers.jsonl, line 1, responses[0] (prompt 'a'): it has no `answer`",
        ),
        ({"prompt": "a", "response": "b"}, {"rewards": "numerc"}, "did you mean numeric?"),
        ({"prompt": "a", "response": "b"}, {"rewards": "reward_model"}, "its run in config.init"),
        ({"prompt": "a"}, {"rewards": "numeric"}, "answers.jsonl, line 1: no `chosen`"),
        ({"response": "b"}, {"rewards": "numeric"}, "answers.jsonl, line 1: no `prompt`"),
        ({"messages": [], "response": "b"}, {"rewards": "numeric"}, "line 1: `messages` is"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "response": "b"},
            {"rewards": "numeric"},
            "line 1: the prompt ends with an answer",
        ),
        ({"prompt": "a", "response": "b"}, {}, "config.init: give"),
        (
            {"prompt": "a", "response": "b"},
            {"rewards": "regex(a)", "least": "most"},
            "config.least: must be a number; was 'most'",
        ),
    ],
)
def test_what_cannot_be_judged(record, fields, message, judged):
    result, lines = judged([record], **fields)
    assert (result.code, result.err.count("\n"), lines) == (2, 1, [])
    assert message in result.err
