"""The `evaluate` stage: scores of a run's model on the text it held out, and on other text."""

import json
import shutil

import pytest


def _scores(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_held_out_text_gives_the_scores_of_the_runs_own_summary(command, finished_run, tmp_path):
    result = command("evaluate", tmp_path / "scores", init=finished_run, batch_size=16)
    assert result.code == 0
    found, summary = _scores(tmp_path / "scores"), _scores(finished_run)
    for name in ("eval/loss", "eval/perplexity", "eval/bits_per_byte"):
        assert found[name] == pytest.approx(summary[name], rel=1e-6)
    assert (found["eval/tokens"], found["eval/bytes"]) == (
        summary["eval/tokens"],
        summary["eval/bytes"],
    )
    assert "bits" in result.out


def test_other_text_is_measured_without_touching_the_run(command, finished_run, tmp_path):
    text = "not at all like the corpus: 0123456789 @@@\n" * 5
    (tmp_path / "other.txt").write_text(text)
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    fields = {"init": finished_run, "data__eval": tmp_path / "other.txt"}
    result = command("evaluate", tmp_path / "scores", batch_size=8, data__seq_len=32, **fields)
    assert result.code == 0
    found = _scores(tmp_path / "scores")
    assert found["eval/bytes"] == len(text.strip())
    assert found["eval/loss"] > _scores(finished_run)["eval/loss"]
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


def test_without_a_work_directory_only_the_table_is_printed(command, finished_run):
    result = command("evaluate", init=finished_run, batch_size=8)
    assert result.code == 0
    assert result.out.strip()


def test_a_work_directory_that_is_a_run_is_left_as_it_is(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "rejected.jsonl").write_text("kept\n")
    other = tmp_path / "other.txt"
    other.write_text("some text to measure on, which is long enough for a row or two\n" * 9)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = command("evaluate", run, init=run, batch_size=8, data__eval=other)
    assert result.code == 2
    assert "another configuration" in result.err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
