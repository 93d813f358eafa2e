"""The stage `generate_data`: a teacher's answers as data, whatever happens meanwhile."""

import json
import shutil
import subprocess
import sys

import pytest

from jaxllm.files import locked
from jaxllm.inference import endpoint
from jaxllm.main import main
from jaxllm.stages import generate_data

KEY = "sk-5ecret5ecret"
RECORDS = [{"prompt": f"{n} + 1?", "answer": str(n + 1), "level": n % 3} for n in range(12)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)


@pytest.fixture
def prompts(json_lines):
    return json_lines(RECORDS, "prompts")


@pytest.fixture
def asked(command, chat_endpoint, prompts, tmp_path):
    """Runs the stage against the endpoint."""

    def run(workdir="run", **fields):
        given = {
            "teacher.url": chat_endpoint.url,
            "teacher.model": "big",
            "teacher.retries": 1,
            "teacher.concurrency": 3,
            "data.train": prompts,
            **{name.replace("__", "."): value for name, value in fields.items()},
        }
        return command("generate_data", tmp_path / workdir, **given)

    return run


@pytest.fixture
def written(tmp_path):
    def read(workdir="run", name="data.jsonl"):
        return [json.loads(x) for x in (tmp_path / workdir / name).read_text().splitlines()]

    return read


def content(body):
    return body["messages"][-1]["content"]


def test_each_answer_is_a_record_with_the_fields_of_its_prompt(asked, written, tmp_path):
    result = asked(temperature=0.7)
    assert result.code == 0, result.err
    lines = written()
    assert [line["prompt"] for line in lines] == [record["prompt"] for record in RECORDS]
    for line, record in zip(lines, RECORDS, strict=True):
        assert {**line, **record} == line
        assert line["response"].startswith(record["prompt"])
        assert line["teacher"]["model"] == "big"
        assert (line["sample"], line["temperature"]) == (0, 0.7)
        assert (line["finish"], line["tokens"]) == ("stop", 3)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data/prompts"], summary["answers/kept"]) == (12, 12)
    assert summary["answers/tokens"] == 36
    assert "time/total" in summary


def test_a_finished_run_says_so_and_asks_nothing(asked, chat_endpoint, tmp_path):
    asked()
    before = (tmp_path / "run" / "data.jsonl").read_bytes()
    result = asked()
    assert (result.code, len(chat_endpoint.requests)) == (0, 12)
    assert "the run is finished" in result.out
    assert (tmp_path / "run" / "data.jsonl").read_bytes() == before


def test_the_key_is_sent_and_written_nowhere(asked, chat_endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("TEACHERS_KEY", KEY)
    said = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    chat_endpoint.reply = lambda body, time: (
        (500, {}, said)
        if content(body).startswith("3 ")
        else (401, {}, said)
        if content(body).startswith("9 ")
        else chat_endpoint.answer(body, time)
    )
    results = [asked(teacher__key_variable="TEACHERS_KEY", teacher__concurrency=1)]
    chat_endpoint.reply = chat_endpoint.answer
    results.append(asked(teacher__key_variable="TEACHERS_KEY"))
    assert [result.code for result in results] == [2, 0]
    headers = [headers["Authorization"] for _, headers, _ in chat_endpoint.requests]
    assert set(headers) == {f"Bearer {KEY}"}
    told = "".join(result.out + result.err for result in results)
    assert "bad key ***" in told
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in (*files, told.encode()))


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_run_that_is_killed_comes_to_the_same_file_and_asks_nothing_twice(
    cut, asked, chat_endpoint, written, tmp_path
):
    asked("whole", samples=2)
    chat_endpoint.requests.clear()

    def reply(body, time):
        if len(chat_endpoint.requests) == 16:  # what a kill at this moment leaves
            shutil.copytree(tmp_path / "other", tmp_path / "run")
        return chat_endpoint.answer(body, time)

    chat_endpoint.reply = reply
    asked("other", samples=2)
    chat_endpoint.reply = chat_endpoint.answer
    assert not (tmp_path / "run" / "summary.json").exists()
    answers = tmp_path / "run" / "answers.jsonl"
    done = len(answers.read_bytes().splitlines())
    assert 4 <= done < 12
    assert 1 <= len(written()) <= 2 * done
    if cut:
        lines = answers.read_bytes().splitlines(keepends=True)
        done -= 1
        answers.write_bytes(b"".join(lines[:-1]) + lines[-1][:-cut])
        with (tmp_path / "run" / "data.jsonl").open("r+b") as file:
            file.truncate(answers.stat().st_size // 2)
    chat_endpoint.requests.clear()
    result = asked(samples=2)
    assert result.code == 0, result.err
    assert f"going on; {12 - done} of 12 prompts are left" in result.err
    assert len(chat_endpoint.requests) == 2 * (12 - done)
    whole = (tmp_path / "whole" / "data.jsonl").read_bytes()
    assert (tmp_path / "run" / "data.jsonl").read_bytes() == whole


def test_the_order_is_that_of_the_prompts_whatever_order_answers_come_in(
    asked, chat_endpoint, tmp_path
):
    asked("whole")

    def reply(body, time):
        chat_endpoint.ended.wait(0.2 if content(body).startswith("0 ") else 0.0)
        return chat_endpoint.answer(body, time)

    chat_endpoint.reply = reply
    asked()
    numbers = [
        json.loads(line)["number"]
        for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    ]
    assert numbers[0] != 0
    assert sorted(numbers) == list(range(12))
    whole = (tmp_path / "whole" / "data.jsonl").read_bytes()
    assert (tmp_path / "run" / "data.jsonl").read_bytes() == whole


def test_what_fails_is_set_aside_and_asked_again_by_the_same_command(
    asked, chat_endpoint, written, prompts, tmp_path
):
    asked("whole")
    chat_endpoint.reply = lambda body, time: (
        (503, {}, b"") if content(body).startswith("4 ") else chat_endpoint.answer(body, time)
    )
    result = asked(max_failed_fraction=0.1)
    assert result.code == 0, result.err
    assert "the same command asks them again" in result.out
    (rejected,) = written(name="rejected.jsonl")
    assert rejected == {
        "file": str(prompts),
        "line": 5,
        "reason": "503 Service Unavailable (asked 2 times)",
    }
    assert len(written()) == 11
    chat_endpoint.reply = chat_endpoint.answer
    chat_endpoint.requests.clear()
    assert asked(max_failed_fraction=0.1).code == 0
    assert chat_endpoint.asked == ["4 + 1?"]
    assert not (tmp_path / "run" / "rejected.jsonl").exists()
    whole = (tmp_path / "whole" / "data.jsonl").read_bytes()
    assert (tmp_path / "run" / "data.jsonl").read_bytes() == whole


def test_what_the_server_cannot_take_stays_set_aside(asked, chat_endpoint, written):
    def reply(body, time):
        too_long = (400, {}, b'{"error": {"message": "too long"}}')
        return too_long if content(body)[0] == "4" else chat_endpoint.answer(body, time)

    chat_endpoint.reply = reply
    for _ in range(2):
        result = asked(max_failed_fraction=0.1, teacher__concurrency=1)
        assert result.code == 0, result.err
        assert [line["reason"] for line in written(name="rejected.jsonl")] == [
            "400 Bad Request: too long"
        ]
        assert len(written()) == 11


def test_too_many_without_an_answer_end_the_run_with_the_others_written(
    asked, chat_endpoint, written
):
    chat_endpoint.reply = lambda body, time: (
        (200, {}, b"{") if content(body)[0] in "23" else chat_endpoint.answer(body, time)
    )
    result = asked()
    assert (result.code, len(written())) == (2, 10)
    assert result.err.splitlines()[-1].startswith("jaxllm: 2 of 12 prompts got no answer")
    assert "config.max_failed_fraction=0.05" in result.err


def test_a_server_that_is_gone_is_not_asked_to_the_end(asked, chat_endpoint, json_lines):
    many = json_lines([{"prompt": f"{n}?"} for n in range(300)])
    chat_endpoint.reply = lambda body, time: (500, {}, b"")
    result = asked(data__train=many, teacher__retries=0)
    assert result.code == 2
    assert "of 300 prompts got no answer" in result.err
    assert len(chat_endpoint.requests) < 100


def test_a_wrong_model_can_be_mended_in_the_same_directory(asked, chat_endpoint, written):
    chat_endpoint.reply = lambda body, time: (
        chat_endpoint.answer(body, time) if body["model"] == "big" else (404, {}, b"")
    )
    result = asked(teacher__model="bug")
    assert (result.code, "refuses: 404" in result.err) == (2, True)
    assert asked().code == 0
    assert len(written()) == 12


@pytest.mark.parametrize("keep", ["all", "best", "first"])
def test_responses_that_are_worth_less_are_left_out(keep, asked, chat_endpoint, written, tmp_path):
    """Half of the prompts get right answers, in two ways, and wrong ones beside them."""
    seen = {}

    def reply(body, time):
        number = int(content(body).split()[0])
        way = seen[number] = seen.get(number, -1) + 1
        ways = [f"{number + 1}", f"<think>hm</think>#### {number + 1}", "It is -1."]
        return chat_endpoint.says(ways[way % 3 if number % 2 else 2])

    chat_endpoint.reply = reply
    spec = {"rewards": "numeric,format:0.5", "least": "1", "keep": keep, "samples": 9}
    spec["teacher__concurrency"] = 1
    result = asked(**spec)
    assert result.code == 0, result.err
    lines = written()
    assert {line["prompt"] for line in lines} == {r["prompt"] for r in RECORDS[1::2]}
    assert all(line["values"]["numeric"] == 1 for line in lines)
    assert len(lines) == (12 if keep == "all" else 6)
    thought = ["</think>" in line["response"] for line in lines]
    assert thought.count(True) == (0 if keep == "first" else 6)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["answers/responses"] == 108
    assert summary["answers/rejected"] > 0
    reasons = ("kept", "duplicates", "rejected", "surplus")
    assert sum(summary[f"answers/{name}"] for name in reasons) == 108


JUDGE = """
import os

def judge(prompts, responses, records):
    with open("judged", "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    if "7 + 1?" in prompts and not os.path.exists("ready"):
        raise ValueError("not now")
    return [1.0] * len(prompts)
"""


def test_what_is_answered_or_judged_is_so_once(asked, chat_endpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text(JUDGE.replace("\\\\", "\\"))
    result = asked(rewards="counting:judge", teacher__concurrency=1)
    assert (result.code, "the reward judge" in result.err) == (2, True)
    assert "not now" in result.err
    answers = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    answered = [RECORDS[json.loads(line)["number"]]["prompt"] for line in answers]
    assert "7 + 1?" in answered
    (tmp_path / "ready").touch()
    (tmp_path / "judged").unlink()
    chat_endpoint.requests.clear()
    assert asked(rewards="counting:judge", teacher__concurrency=1).code == 0
    assert set(chat_endpoint.asked) == {record["prompt"] for record in RECORDS} - set(answered)
    judged = (tmp_path / "judged").read_text().splitlines()
    assert "7 + 1?" in judged
    assert "0 + 1?" not in judged


@pytest.fixture(scope="module")
def reward_run(arguments, finished_run, json_lines, compiled, tmp_path_factory):
    """Makes a reward model of few steps."""
    pairs = [{"prompt": f"{n}?", "chosen": "a a", "rejected": "b"} for n in range(40)]

    def make(**fields):
        workdir = tmp_path_factory.mktemp("reward") / "run"
        given = {"init": finished_run, "data.train": json_lines(pairs), "steps": 3, **fields}
        assert main(arguments("reward", workdir, given)) == 0
        return workdir

    return make


def test_a_reward_model_says_which_response_is_the_best(
    asked, chat_endpoint, written, reward_run, tmp_path
):
    run = reward_run()
    answers = ["a a", "b", "a b a"]
    chat_endpoint.reply = lambda body, time: chat_endpoint.says(answers[body["seed"] % 3])
    spec = {"rewards": "reward_model", "reward__init": run, "samples": 6}
    assert asked("all", **spec).code == 0
    result = asked(keep="best", **spec)
    assert result.code == 0, result.err
    rewards = {}
    for line in written("all"):
        rewards.setdefault(line["prompt"], {})[line["response"]] = line["reward"]
    assert max(map(len, rewards.values())) > 1
    best = {line["prompt"]: line["reward"] for line in written()}
    assert best == {prompt: max(found.values()) for prompt, found in rewards.items()}
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(run)
    shutil.copytree(reward_run(seed=1), run)
    result = asked(keep="best", **spec)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the reward model is not the one that the run began with" in result.err


def test_two_runs_do_not_write_into_one_directory(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(generate_data, "_PATIENCE_SECONDS", 0.0)
    with locked(tmp_path / "run"):
        result = asked()
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "another process writes here" in result.err


def test_the_same_is_asked_and_kept_once(asked, chat_endpoint, json_lines, tmp_path):
    chat_endpoint.reply = lambda body, time: chat_endpoint.says("always")
    twice = json_lines([*RECORDS[:3], {"messages": [{"role": "user", "content": "0 + 1?"}]}])
    assert asked(data__train=twice, samples=4).code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data/prompts"], summary["data/duplicate_prompts"]) == (3, 1)
    assert len(chat_endpoint.requests) == 12
    assert (summary["answers/kept"], summary["answers/duplicates"]) == (3, 9)


def test_the_teacher_alone_reads_the_system_message(asked, chat_endpoint, written, json_lines):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    records = json_lines([{"prompt": "a"}, {"messages": own}])
    assert asked(data__train=records, teacher__system="Think.", teacher__concurrency=1).code == 0
    roles = [[m["content"] for m in body["messages"]] for _, _, body in chat_endpoint.requests]
    assert roles == [["Think.", "a"], ["Own.", "Hi"]]
    first, second = written()
    assert first["prompt"] == "a"
    assert "Think." not in json.dumps(first)
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant"]


def test_fine_tuning_reads_what_was_written(asked, command, finished_run, chat_endpoint, tmp_path):
    thought = {"reasoning_content": "one more"}
    chat_endpoint.reply = lambda body, time: chat_endpoint.says("right", **thought)
    asked()
    data = tmp_path / "run" / "data.jsonl"
    result = command("sft", init=finished_run, data__train=data, preview=2, data__seq_len=64)
    assert result.code == 0, result.err
    assert "<think>one more</think>right" in result.out


def local(command, workdir, finished_run, prompts, **fields):
    given = {
        "teacher.init": finished_run,
        "data.train": prompts,
        "max_new_tokens": 6,
        "samples": 2,
        "batch_size": 2,
        **fields,
    }
    return command("generate_data", workdir, **given)


def test_a_model_on_this_machine_answers_by_its_seed(command, finished_run, prompts, tmp_path):
    def text(name, **fields):
        result = local(command, tmp_path / name, finished_run, prompts, **fields)
        assert result.code == 0, result.err
        return (tmp_path / name / "data.jsonl").read_text()

    first = text("first")
    lines = [json.loads(line) for line in first.splitlines()]
    assert {line["teacher"]["init"] for line in lines} == {str(finished_run)}
    assert {line["sample"] for line in lines} == {0, 1}
    assert all(1 <= line["tokens"] <= 6 for line in lines)
    assert [line["prompt"] for line in lines] == sorted(
        (line["prompt"] for line in lines), key=[r["prompt"] for r in RECORDS].index
    )
    assert text("again") == first
    assert text("other", seed=1) != first


def test_a_local_run_that_is_killed_comes_to_the_same_file(
    command, finished_run, prompts, tmp_path
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    local(command, whole, finished_run, prompts)
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    lines = (run / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (run / "answers.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:9])
    (run / "data.jsonl").write_bytes((run / "data.jsonl").read_bytes()[:700])
    result = local(command, run, finished_run, prompts)
    assert result.code == 0, result.err
    assert "going on; 6 of 12 prompts are left" in result.err
    for name in ("data.jsonl", "answers.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


TEMPLATE = """\
{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}<think>{% endif %}"""


def test_thinking_that_a_template_begins_is_begun_in_the_response(
    command, finished_run, prompts, written, tmp_path
):
    (tmp_path / "thinking.jinja").write_text(TEMPLATE)
    template = tmp_path / "thinking.jinja"
    fields = {"teacher.template": template, "rewards": "regex(^<think>)"}
    result = local(command, tmp_path / "run", finished_run, prompts, **fields)
    assert result.code == 0, result.err
    assert {line["reward"] for line in written()} == {1.0}
    assert not any("<think><think>" in line["response"] for line in written())


def test_a_prompt_that_is_too_long_is_set_aside(command, finished_run, json_lines, tmp_path):
    records = json_lines([{"prompt": "a b"}, {"prompt": "a b c " * 80}])
    result = local(command, tmp_path / "run", finished_run, records, max_failed_fraction=0.5)
    assert result.code == 0, result.err
    (rejected,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["line"] == 2
    assert "too long" in rejected


def test_another_teacher_in_its_place_is_told(command, finished_run, prompts, tmp_path):
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(finished_run, teacher)
    local(command, run, teacher, prompts)
    (run / "summary.json").unlink()
    newest = max((teacher / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    result = local(command, run, teacher, prompts)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the teacher is not the one that the run began with (it has changed since)" in result.err


WRONG = [
    ({"teacher.url": ""}, "config.teacher.init: give the run directory"),
    ({"teacher.init": "runs/x"}, "and not both"),
    ({"teacher.model": ""}, "config.teacher.model: give the name"),
    ({"teacher.template": "chatml"}, "config.teacher.template: the endpoint has its own"),
    ({"teacher.url": "localhost:8000"}, "config.teacher.url: is no URL"),
    ({"teacher.url": "http://me:word@host/v1"}, "config.teacher.url: holds more than a place"),
    ({"teacher.url": "http://host/v1?key=a"}, "config.teacher.url: holds more than a place"),
    ({"teacher.key_variable": "sk-12"}, "config.teacher.key_variable: is the name of an"),
    ({"teacher.key_variable": "NOT_SET"}, "config.teacher.key_variable: there is no"),
    ({"teacher.extra": "[]"}, "config.teacher.extra: is no JSON object"),
    ({"teacher.concurrency": 0}, "config.teacher.concurrency: must be at least 1"),
    ({"teacher.timeout": 0.0}, "config.teacher.timeout: must be positive"),
    ({"data.train": ""}, "config.data.train: names no prompts"),
    ({"data.train": "no.jsonl"}, "config.data.train: no.jsonl: there is no such file"),
    ({"data.train": "builtin:chain:5@0.5"}, "config.data.train: builtin:chain:5 has a weight"),
    ({"rewards": "numerc"}, "did you mean numeric?"),
    ({"rewards": "reward_model"}, "its run in config.reward.init"),
    ({"rewards": "arithmetic"}, "it has no `numbers`"),
    ({"least": "1"}, "config.least: needs rewards"),
    ({"rewards": "numeric", "least": "high"}, "config.least: must be a number; was 'high'"),
    ({"rewards": "numeric", "least": "nan"}, "config.least: must be a number"),
    ({"keep": "best"}, "config.keep: needs rewards"),
    ({"keep": "some"}, "config.keep: must be one of all, best, first"),
    ({"samples": 0}, "config.samples: must be at least 1"),
    ({"max_failed_fraction": 1.5}, "config.max_failed_fraction: must be"),
]


@pytest.mark.parametrize(("fields", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_is_wrong_is_told_before_anything_is_asked(fields, told, asked, chat_endpoint):
    result = asked(**{name.replace(".", "__"): value for name, value in fields.items()})
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert told in result.err
    assert "sk-12" not in result.err
    assert not chat_endpoint.requests


def test_bad_prompts_are_told(asked, json_lines, chat_endpoint):
    records = json_lines([{"prompt": "a"}, {"answer": "4"}])
    result = asked(data__train=records)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "more than config.data.max_bad_fraction=0.01 allows" in result.err
    assert not chat_endpoint.requests


def test_a_directory_is_needed_and_nobody_elses_data_are_written_over(
    asked, command, prompts, chat_endpoint, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.jsonl").write_text("mine\n")
    result = asked()
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "has data.jsonl and no config.json" in result.err
    assert (tmp_path / "run" / "data.jsonl").read_text() == "mine\n"
    result = command(
        "generate_data",
        **{"teacher.url": chat_endpoint.url, "teacher.model": "m", "data.train": prompts},
    )
    assert (result.code, "--workdir is missing" in result.err) == (2, True)


def test_a_changed_configuration_is_told_but_for_how_it_is_asked(asked, json_lines):
    assert asked().code == 0
    result = asked(temperature=0.5, samples=2)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "config.temperature: was 1.0, now 0.5; config.samples: was 1, now 2" in result.err
    assert asked(teacher__retries=3, teacher__concurrency=1, teacher__timeout=9.0).code == 0
    assert asked(batch_size=4, max_failed_fraction=0.5).code == 0


def test_changed_prompts_are_told(asked, chat_endpoint, json_lines):
    records = json_lines(RECORDS, "changing")
    chat_endpoint.reply = lambda body, time: (
        (401, {}, b"") if content(body).startswith("9 ") else chat_endpoint.answer(body, time)
    )
    assert asked(data__train=records).code == 2
    records.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[1:]))
    result = asked(data__train=records)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the text is not the one that the run began with" in result.err


def test_several_processes_are_refused(arguments, tmp_path):
    given = [*arguments("generate_data", tmp_path), "--coordinator=127.0.0.1:1", "--processes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.main", *given, "--process=0"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the stage generate_data runs as a single process" in done.stderr
