"""Supervised fine-tuning through the command: what a user sees, and what a later stage finds."""

import json
import re

import pytest

from jaxllm.inference.chat import Chat
from jaxllm.reporting.samples import read_samples


@pytest.fixture(scope="module")
def instructions(json_lines):
    """Questions with answers that are much alike."""
    return json_lines(
        {"instruction": f"Repeat {n}", "input": f" {n}", "output": f"yes {n}"} for n in range(80)
    )


@pytest.fixture
def sft(command, finished_run, instructions):
    def run(workdir=None, **fields):
        given = {"init": finished_run, "data__train": instructions, **fields}
        return command("sft", workdir, **given)

    return run


def test_a_run_learns_to_answer_and_tells_it(sft, command, curve, tmp_path):
    run = tmp_path / "run"
    result = sft(run, steps=12)
    assert result.code == 0, result.err
    found = curve(run)
    assert found[12] < 0.9 * found[3]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval/loss"] == pytest.approx(found[12])
    assert summary["data/dropped"] == 0
    assert 0 < summary["data/trained_tokens"] < summary["data/train_tokens"]
    assert "eval/bits_per_byte" not in summary
    samples = read_samples(run / "samples.md")
    assert {sample.step for sample in samples} == {3, 6, 9, 12}
    assert all(re.fullmatch(r"Repeat \d+ \d+", sample.prompt) for sample in samples)
    assert "tokens learnt" not in result.out
    assert "training tokens that are learnt" in result.out
    assert sft(run, steps=12).out.endswith("raise config.steps to train on.\n")

    evaluated = command("evaluate", tmp_path / "evaluated", init=run)
    assert evaluated.code == 0, evaluated.err
    again = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert again["eval/loss"] == pytest.approx(found[12], abs=1e-5)
    assert again["eval/tokens"] == summary["eval/tokens"]
    assert "eval/bits_per_byte" not in again

    # Whoever speaks to it does so as it was trained, without saying how.
    answer = command("chat", init=run, prompt="Repeat 3 3", temperature=0.0, max_new_tokens=4)
    named = command(
        "chat", init=run, prompt="Repeat 3 3", temperature=0.0, max_new_tokens=4,
        template="bos_separated",
    )  # fmt: skip
    assert answer.code == named.code == 0
    assert answer.out == named.out
    assert command("generate", init=run, prompt="a").code == 0
    assert command("pretrain", tmp_path / "more", init=run, steps=1).code == 0


def test_a_resumed_run_is_the_uninterrupted_one(sft, curve, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fields = {"optimizer__schedule": "constant", "sft__layout": "chat"}
    assert sft(whole, **fields).code == 0
    assert sft(halves, steps=3, **fields).code == 0
    assert sft(halves, steps=6, **fields).code == 0
    assert curve(halves, "train/loss") == curve(whole, "train/loss")


def test_another_layout_or_changed_data_is_refused_in_a_run_that_has_begun(
    sft, instructions, tmp_path
):
    data, template = tmp_path / "data.jsonl", tmp_path / "mine.jinja"
    data.write_bytes(instructions.read_bytes())
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    fields = {"data__train": data, "sft__layout": "chat", "sft__template": template}
    assert sft(tmp_path / "run", steps=1, **fields).code == 0
    result = sft(tmp_path / "run", steps=2, **fields | {"sft__template": "chatml"})
    assert (result.code, "config.sft.template: was" in result.err) == (2, True)
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    result = sft(tmp_path / "run", steps=2, **fields)
    assert (result.code, "the layout is not the one" in result.err) == (2, True)


def test_a_preview_shows_what_is_learnt(sft, tmp_path):
    result = sft(preview=3)
    assert result.code == 0
    assert re.search(r"Repeat \d+ \d+«<s>yes \d+</s>»", result.out)
    assert result.out.count("─── example") == 3
    assert "examples cut: 0, left out, with nothing to learn in: 0" in result.out
    result = sft(preview=1, sft__layout="chat", data__seq_len=64)
    assert result.code == 0
    assert re.search(r"«yes \d+<\|im_end\|>»", result.out)
    assert sft(preview=1, init=tmp_path / "nowhere").code == 2


def test_what_many_conversations_share_makes_no_copies_of_them(sft, json_lines, tmp_path):
    system = {"role": "system", "content": " ".join(f"word{n}" for n in range(60))}
    records = [
        {
            "messages": [
                system,
                {"role": "user", "content": f"{n}"},
                {"role": "assistant", "content": f"{n}"},
            ]
        }
        for n in range(40)
    ]
    data = json_lines(records)
    assert sft(tmp_path / "run", data__train=data, data__seq_len=512, steps=1).code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data/train_documents"] + summary["data/eval_documents"] == 40


def test_samples_are_asked_with_their_tools(sft, json_lines, tmp_path, monkeypatch):
    asked = []
    ask = Chat.ask
    monkeypatch.setattr(
        Chat, "ask", lambda self, *given: (asked.append(given[1]), ask(self, *given))[1]
    )
    tools = [{"name": "f"}]
    answer = {"role": "assistant", "content": "y"}
    records = (
        {"messages": [{"role": "user", "content": f"{n}"}, answer], "tools": tools}
        for n in range(40)
    )
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    fields = {"data__train": json_lines(records), "sft__layout": "chat", "sft__template": template}
    assert sft(tmp_path / "run", steps=1, **fields).code == 0
    assert asked == [tools] * 3


def test_text_can_be_mixed_in(sft, corpus, instructions, tmp_path):
    train = f"{instructions}@0.5,{corpus}@0.5"
    assert sft(tmp_path / "run", data__train=train, steps=2).code == 0
    found = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f"data/source/{corpus}/share" in found


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "A"}]}, "begins with assistant"),
        ({"messages": [{"role": "human", "content": "Q"}]}, "known are system, user, assistant"),
        ({"instruction": "Q", "output": ""}, "empty answer"),
        ({"label": 1, "x": 2}, "no `instruction` and `output`"),
    ],
)
def test_bad_records_are_set_aside_and_too_many_end_the_run(
    record, reason, sft, instructions, json_lines, tmp_path
):
    good = list(map(json.loads, instructions.read_text().splitlines()))
    data = json_lines([record, *good])
    result = sft(tmp_path / "run", data__train=data)
    assert result.code == 2
    assert f"{data}:1 (" in result.err
    assert reason in result.err
    assert sft(tmp_path / "run", data__train=data, data__max_bad_fraction=0.1, steps=1).code == 0
    rejected = json.loads((tmp_path / "run" / "rejected.jsonl").read_text())
    assert rejected["line"] == 1
    assert reason in rejected["reason"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": ""}, "config.init: give the run directory"),
        ({"init": "/nowhere"}, "/nowhere"),
        ({"data__packing": "concat"}, "config.data.packing: concat would cut examples"),
        ({"sft__layout": "chat", "sft__template": "llama3"}, "llama3 writes <|start_header_id|>"),
        ({"sft__template": "chatml"}, "config.sft.template: the layout bos_separated"),
        ({"data__seq_len": 2}, "too long for config.data.seq_len"),
        ({"data__eval": "long.jsonl"}, "of the 1 held-out documents none has anything to predict"),
        ({"prompt": "x" * 99}, "too long to be answered"),
        ({"data__train": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        (
            {"sft__layout": "chat", "sft__template": "gone.jinja"},
            "config.sft.template: gone.jinja: cannot be read",
        ),
        (
            {"sft__layout": "chat", "sft__template": "silent.jinja"},
            "or its layout writes no answers; leave the source out, or look at it",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(fields, message, sft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"prompt": "x" * 99, "response": "y"}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    (tmp_path / "silent.jinja").write_text("{{ messages[0].content }}")
    result = sft(tmp_path / "run", **fields)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "checkpoints").exists()
