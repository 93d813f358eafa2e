"""The `evaluate` stage on tasks: scores, items, examples, baselines, and the report."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxllm.command_line import override
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.evaluation.text_model import TrainedTextModel
from jaxllm.inference.trained import load_trained
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.evaluate import EvaluateConfig

CONFIG = Path(__file__).parent.parent.parent / "configs" / "evaluate.py"


def _scores(workdir):
    return json.loads((workdir / "summary.json").read_text())


def _items(workdir):
    return [json.loads(line) for line in (workdir / "items.jsonl").read_text().splitlines()]


@pytest.fixture
def choices(tmp_path):
    path = tmp_path / "mine.jsonl"
    records = [
        {"query": f"Question: {n} and a?", "choices": ["bad", "no good", "cab"], "gold": n % 3}
        for n in range(7)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_tasks_are_scored_as_the_model_finds_them_likely(command, finished_run, choices, tmp_path):
    workdir = tmp_path / "scores"
    result = command("evaluate", workdir, init=finished_run, tasks=choices, batch_size=8)
    assert result.code == 0
    found, items = _scores(workdir), _items(workdir)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = TrainedTextModel(load_trained(finished_run, mesh))
        for item in items:
            pairs = [(item["prompt"], f" {choice}") for choice in item["choices"]]
            totals = [one.total for one in model.log_likelihoods(pairs)]
            assert item["log_likelihoods"] == pytest.approx(totals, rel=1e-4)
            assert totals.index(max(totals)) == item["chosen"]
            assert item["acc"] == (item["chosen"] == item["gold"])
    assert found["evaluate/mine/score"] == pytest.approx(sum(i["acc"] for i in items) / 7)
    assert found["evaluate/mine/chance"] == pytest.approx(1 / 3)
    assert found["evaluate/mine/items"] == 7
    assert not any(name.startswith("eval/") for name in found)
    assert "mine" in result.out
    for name, error in (("score", "stderr"), ("acc_norm", "acc_norm_stderr")):
        values = (found[f"evaluate/mine/{each}"] for each in (name, error))
        assert "{:.4f} ± {:.4f}".format(*values) in result.out
    assert "Tasks" in (workdir / "report.html").read_text()


def test_several_numbers_of_examples_make_a_curve(command, finished_run, tmp_path):
    workdir = tmp_path / "scores"
    result = command(
        "evaluate",
        workdir,
        init=finished_run,
        tasks="sums=builtin:arithmetic:40",
        max_items=4,
        fewshot="0,2",
        max_new_tokens=3,
    )
    assert result.code == 0
    assert {f"evaluate/sums/{n}_shot/score" for n in (0, 2)} <= set(_scores(workdir))
    items = _items(workdir)
    assert [(item["shots"], len(item["examples"])) for item in items] == [(0, 0)] * 4 + [(2, 2)] * 4
    assert "sums: score by examples in the prompt" in (workdir / "report.html").read_text()


def test_the_same_model_prompted_otherwise_is_a_baseline(command, finished_run, choices, tmp_path):
    workdir = tmp_path / "scores"
    fields = {"baseline__init": str(finished_run), "baseline__fewshot": 1}
    result = command("evaluate", workdir, init=finished_run, tasks=choices, **fields)
    assert result.code == 0
    found = _scores(workdir)
    difference = found["evaluate/mine/score"] - found["evaluate/mine/baseline_score"]
    assert found["evaluate/mine/difference"] == pytest.approx(difference)
    assert "evaluate/mine/difference_stderr" in found
    models = [(item["model"], item["shots"]) for item in _items(workdir)]
    expected = [(str(finished_run), 0)] * 7 + [(f"baseline: {finished_run}", 1)] * 7
    assert models == expected


def test_two_equal_models_do_not_differ(command, finished_run, choices, tmp_path):
    twin = shutil.copytree(finished_run, tmp_path / "twin")
    fields = {"init": finished_run, "baseline__init": twin, "tasks": choices}
    assert command("evaluate", tmp_path / "scores", **fields).code == 0
    found = _scores(tmp_path / "scores")
    assert (found["evaluate/mine/difference"], found["evaluate/mine/difference_stderr"]) == (0, 0)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [("config.json", "is no run directory"), ("tokenizer", "there is no tokenizer here")],
)
def test_a_second_model_that_is_none_is_told_before_the_first_is_measured(
    command, finished_run, choices, monkeypatch, lacking, message, tmp_path
):
    ignored = shutil.ignore_patterns(lacking, "checkpoints", "store")
    other = shutil.copytree(finished_run, tmp_path / "other", ignore=ignored)
    monkeypatch.setattr("jaxllm.stages.evaluate.load_trained", lambda *_: pytest.fail("loaded"))
    fields = {"init": finished_run, "baseline__init": other, "tasks": choices}
    result = command("evaluate", tmp_path / "s", **fields)
    assert result.code == 2
    assert str(other) in result.err and message in result.err
    assert not (tmp_path / "s" / "config.json").exists()


def test_the_first_models_scores_are_kept_whatever_becomes_of_the_second(
    command, finished_run, choices, tmp_path
):
    ignored = shutil.ignore_patterns("checkpoints", "store")
    other = shutil.copytree(finished_run, tmp_path / "other", ignore=ignored)
    fields = {"init": finished_run, "baseline__init": other, "tasks": choices}
    result = command("evaluate", tmp_path / "s", **fields)
    assert result.code == 2
    assert "the run has no checkpoint yet" in result.err
    assert {"evaluate/mine/score", "evaluate/mine/stderr"} <= _scores(tmp_path / "s").keys()
    assert len(_items(tmp_path / "s")) == 7
    # Once it has one, the same command goes through.
    shutil.copytree(finished_run / "checkpoints", other / "checkpoints")
    assert command("evaluate", tmp_path / "s", **fields).code == 0
    assert _scores(tmp_path / "s")["evaluate/mine/difference"] == 0


def test_files_that_are_no_runs_are_not_written_over(command, finished_run, choices, tmp_path):
    (tmp_path / "items.jsonl").write_text("precious\n")
    result = command("evaluate", tmp_path, init=finished_run, tasks=choices)
    assert result.code == 2
    assert "has items.jsonl and no config.json" in result.err
    assert (tmp_path / "items.jsonl").read_text() == "precious\n"


def test_text_and_tasks_are_measured_together(command, finished_run, choices, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("some text to measure on, which is long enough for a row or two\n" * 9)
    workdir = tmp_path / "scores"
    fields = {"tasks": choices, "data__eval": other, "batch_size": 8}
    assert command("evaluate", workdir, init=finished_run, **fields).code == 0
    assert {"eval/loss", "evaluate/mine/score"} <= set(_scores(workdir))


def test_training_text_is_looked_through(command, finished_run, choices, tmp_path):
    text = tmp_path / "train.jsonl"
    text.write_text(json.dumps({"text": "so: Question 2 and a, or not"}) + "\n")
    fields = {
        "contamination__train": text,
        "contamination__ngram": 4,
        "contamination__min_words": 4,
    }
    result = command("evaluate", tmp_path / "s", init=finished_run, tasks=choices, **fields)
    assert result.code == 0
    found = _scores(tmp_path / "s")
    assert found["evaluate/mine/contaminated"] == pytest.approx(1 / 7)
    assert found["evaluate/mine/unchecked"] == 0
    assert "evaluate/mine/clean_score" in found


def test_training_text_that_cannot_be_looked_through_is_told(
    command, finished_run, choices, tmp_path
):
    text = tmp_path / "train.jsonl"
    text.write_text('{"text": "a"}\n' + "no JSON\n" * 4)
    fields = {"init": finished_run, "tasks": choices, "contamination__min_words": 4}
    result = command("evaluate", tmp_path / "s", contamination__train=text, **fields)
    assert result.code == 2
    assert "4 of the 5 lines read are bad" in result.err
    # Where every item is too short to be looked for, nothing is said of any.
    del fields["contamination__min_words"]
    missing = command("evaluate", contamination__train=tmp_path / "nowhere.jsonl", **fields)
    assert (missing.code, "no such file" in missing.err) == (2, True)
    assert command("evaluate", tmp_path / "s", contamination__train=text, **fields).code == 0
    found = _scores(tmp_path / "s")
    assert found["evaluate/mine/contaminated"] is found["evaluate/mine/clean_score"] is None
    assert found["evaluate/mine/unchecked"] == 1


def test_prompts_that_lose_their_beginning_are_told(command, finished_run, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": "a b " * 2000, "continuation": "c"}) + "\n")
    result = command("evaluate", tmp_path / "s", init=finished_run, tasks=path)
    assert result.code == 0
    assert "Some prompts lost their beginning" in result.err
    assert _scores(tmp_path / "s")["evaluate/long/cut"] == 1
    assert _items(tmp_path / "s")[0]["left_out"] > 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": "nowhere.jsonl"}, "config.tasks: nowhere.jsonl: there is no such file"),
        ({"tasks": "builtin:countdown:3"}, "is of no known kind"),
        ({"tasks": "builtin:sorting:3", "fewshot": 3}, "config.fewshot: 3 examples are asked for"),
        ({"tasks": "builtin:sorting:3", "fewshot": "x"}, "config.fewshot: is a list of whole"),
        ({"baseline__fewshot": -2}, "config.baseline.fewshot: must not be negative"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    command, finished_run, tmp_path, fields, message
):
    ignored = shutil.ignore_patterns("checkpoints", "tokenizer", "store")
    run = shutil.copytree(finished_run, tmp_path / "run", ignore=ignored)
    result = command("evaluate", tmp_path / "s", init=run, **fields)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "s" / "config.json").exists()


def test_bad_records_are_listed_in_the_work_directory(command, finished_run, choices, tmp_path):
    choices.write_text(choices.read_text() + '{"query": "a", "choices": [], "gold": 0}\n')
    fields = {"init": finished_run, "tasks": choices, "data__max_bad_fraction": 0.2}
    assert command("evaluate", tmp_path / "s", **fields).code == 0
    (line,) = (tmp_path / "s" / "rejected_items.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 8


@pytest.fixture(scope="module")
def preset():
    """The configuration of a preset of configs/evaluate.py."""
    spec = importlib.util.spec_from_file_location("evaluate_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_preset_runs_without_a_file(command, finished_run, preset, tmp_path):
    for name in preset.PRESETS:
        config = preset.get_config(name)
        override(config, ["--config.max_items=2", "--config.max_new_tokens=2"])
        checked = from_dict(EvaluateConfig, config)
        shots = str(max(checked.shots()))
        fields = {"tasks": checked.tasks, "fewshot": shots, "chat": checked.chat}
        fields |= {"max_items": 2, "max_new_tokens": 2, "init": finished_run}
        fields |= {"chain_of_thought": checked.chain_of_thought}
        fields |= {"baseline__fewshot": checked.baseline.fewshot}
        assert command("evaluate", tmp_path / name, **fields).code == 0, name
        found = _scores(tmp_path / name)
        assert sum(path.endswith("/score") for path in found) == checked.tasks.count(",") + 1
    with pytest.raises(UserError, match="has no preset 'none'; it has :tasks, "):
        preset.get_config("none")


def test_published_weights_have_no_held_out_text(command, finished_run, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxllm.stages.evaluate._recorded_data", lambda init: None)
    result = command("evaluate", tmp_path / "s", init=finished_run)
    assert result.code == 2
    assert "no text that was held out; give some" in result.err
