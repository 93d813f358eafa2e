"""Runs are read from tables and directories, and what cannot be one is told."""

import json

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.scaling.measured import as_curves, as_runs, joined, read_runs


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def directory(path, stage="pretrain", metrics=(), **scores):
    path.mkdir(parents=True)
    config = {"stage": stage, "init": scores.pop("init", "")}
    (path / "config.json").write_text(json.dumps({"config": config, "data": {}, "versions": {}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if scores:
        (path / "summary.json").write_text(json.dumps(scores))
    return path


FINISHED = {
    "model/parameters": 1000.0,
    "model/embedding_parameters": 400.0,
    "train/tokens": 5000.0,
    "train/steps": 10.0,
    "data/train_tokens": 2000.0,
    "eval/loss": 3.0,
    "eval/accuracy": None,
}


def test_a_table_with_two_of_n_d_and_c(tmp_path):
    path = table(
        tmp_path / "runs.csv",
        "N,D,C,loss,accuracy,note\n1e6,2e7,,3.5,0.4,first\n1e6,,1.2e14,3.5,,\n,2e7,1.2e14,3.5,0.5,\n",
    )
    runs = read_runs([path], "eval/loss")
    for run in runs:
        assert run.parameters == pytest.approx(1e6)
        assert run.tokens == run.unique == pytest.approx(2e7)
    assert [run.scores for run in runs] == [{"accuracy": 0.4}, {}, {"accuracy": 0.5}]
    assert runs[0].name.endswith("runs.csv:2")
    np.testing.assert_allclose(as_runs(runs, "all").flops, 1.2e14)


def test_lines_of_one_run_are_its_curve(tmp_path):
    path = table(
        tmp_path / "runs.csv",
        "run,parameters,tokens,unique_tokens,embedding_parameters,loss\n"
        "a,100,10,10,30,5\na,100,20,15,30,4\nb,200,10,10,30,4.5\n",
    )
    runs = read_runs([path], "eval/loss")
    assert [(run.loss, run.unique) for run in runs] == [(4.0, 15.0), (4.5, 10.0)]
    assert runs[0].name.endswith("runs.csv:a")
    (curve,) = as_curves(runs, "non_embedding")
    assert curve.parameters == 70
    np.testing.assert_array_equal(curve.losses, [5, 4])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("N,D,loss\n1e6,2e7,nan\n", r"runs.csv:2: loss is 'nan', and must be a number above 0"),
        ("N,D,loss\n1e6,2e7,3\n1e6,-2,3\n", r"runs.csv:3: D is '-2'"),
        ("N,D,loss\n1e6,many,3\n", r"runs.csv:2: D is 'many'"),
        ("N,D,C,loss\n1e6,2e7,5e14,3\n", r"runs.csv:2: C is 5e\+14, and 6 N D is 1.2e\+14"),
        ("N,loss\n1e6,3\n", r"wants loss and two of N \(or .*columns are N, loss"),
        ("N,D,Loss\n1e6,2e7,3\n", r"wants loss .*columns are N, D, Loss"),
        ("run,N,D,loss\na,1e6,2e7,3\na,2e6,3e7,3\n", "run a have several sizes"),
        ("run,N,D,loss\na,1e6,2e7,3\na,1e6,1e7,3\n", "tokens of the run a do not rise"),
        ("", "has no lines of runs"),
        ("N,D,loss\n , ,\n", "has no lines of runs"),
        ("N,D,loss\n1e300,1e300,3\n", "runs.csv:2: N is '1e300'"),
        ("N,D,loss,embedding_parameters\n1e6,2e7,3,2e6\n", "2e.06 of 1e.06 parameters are told"),
    ],
)
def test_a_line_that_is_no_run_is_told(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        read_runs([table(tmp_path / "runs.csv", text)], "eval/loss")


def test_spaces_and_rounding_are_no_mistake(tmp_path):
    text = "run, C, D, loss\na, 1.2e14, 1.9e7, 4\n\na, 1.26e14, 2e7, 3\n"
    (run,) = read_runs([table(tmp_path / "runs.csv", text)], "eval/loss")
    assert len(run.curve) == 2
    assert run.parameters == pytest.approx(1.05e6)


def test_attention_may_be_counted_in_c(tmp_path):
    path = table(tmp_path / "runs.csv", "N,D,C,loss\n1e6,2e7,1.4e14,3\n")
    assert read_runs([path], "eval/loss")[0].tokens == 2e7


def test_a_run_directory_and_its_curve(tmp_path):
    metrics = [{"step": step, "time": 0.0, "eval/loss": 10.0 - step} for step in (2, 4, 10)]
    directory(tmp_path / "runs" / "a", metrics=metrics, **FINISHED)
    directory(tmp_path / "runs" / "b")  # is not finished
    (run,) = read_runs([str(tmp_path / "runs")], "eval/loss")
    assert run.parameters == 1000
    assert run.counted("non_embedding") == 600
    assert (run.tokens, run.unique, run.loss) == (5000, 2000, 3.0)
    assert run.curve == [(1000.0, 8.0), (2000.0, 6.0), (5000.0, 0.0)]
    assert "eval/accuracy" not in run.scores
    twice = [f"{tmp_path}/runs/a", f"{tmp_path}/runs", f"{tmp_path}/runs/a/../a"]
    assert read_runs(twice, "eval/loss") == [run]
    (tmp_path / "runs" / "a.log").touch()
    assert read_runs([f"{tmp_path}/runs/a*"], "eval/loss") == [run]
    with pytest.raises(UserError, match="runs/b: is not finished"):
        read_runs([f"{tmp_path}/runs/*"], "eval/loss")


def test_tokens_are_those_of_text(tmp_path):
    run = directory(tmp_path / "a", **FINISHED, **{"data/fill_rate": 0.5})
    assert read_runs([str(run)], "eval/loss")[0].tokens == 2500


@pytest.mark.parametrize(
    ("stage", "init", "told"),
    [("sft", "", "is of another stage"), ("pretrain", "runs/first", "begins from runs/first")],
)
def test_a_run_that_has_read_more_than_it_tells_is_told(tmp_path, stage, init, told):
    run = directory(tmp_path / "a", stage, init=init, **FINISHED)
    with pytest.raises(UserError, match=told):
        read_runs([str(run)], "eval/loss")


@pytest.mark.parametrize("loss", [None, "missing", -1.0, 0.0])
def test_a_run_that_diverged_is_told(tmp_path, loss):
    scores = FINISHED | {"eval/loss": loss}
    directory(tmp_path / "a", **scores)
    with pytest.raises(UserError, match="a: its eval/loss is not there or no number above 0"):
        read_runs([str(tmp_path / "a")], "eval/loss")


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="name runs"):
        read_runs([], "eval/loss")
    with pytest.raises(UserError, match="neither a run directory"):
        read_runs([str(tmp_path)], "eval/loss")
    with pytest.raises(UserError, match=r"nothing\.csv: cannot be read"):
        read_runs([str(tmp_path / "nothing.csv")], "eval/loss")


def test_parameters_that_are_not_told_apart_are_told(tmp_path):
    runs = read_runs([table(tmp_path / "runs.csv", "N,D,loss\n1e6,2e7,3\n")], "eval/loss")
    with pytest.raises(UserError, match="how many of its parameters are embeddings"):
        as_runs(runs, "non_embedding")
    text = "run,N,D,loss\na,1e6,2e7,3\na,1e6,3e7,2\n"
    runs = read_runs([table(tmp_path / "runs.csv", text)], "eval/loss")
    with pytest.raises(UserError, match="how many of its parameters are embeddings"):
        as_curves(runs, "non_embedding")


def test_evaluations_join_the_run_that_they_measured(tmp_path):
    run = directory(tmp_path / "a", **FINISHED)
    directory(tmp_path / "e", "evaluate", init=str(run), **{"evaluate/copa/score": 0.6})
    found = joined(read_runs([str(run)], "eval/loss"), [str(tmp_path / "e")])
    assert found[0].scores["evaluate/copa/score"] == 0.6
    other = directory(tmp_path / "o", "evaluate", init=str(tmp_path), x=1.0)
    with pytest.raises(UserError, match="which is none of the runs"):
        joined(found, [str(other)])
