"""A run that is stopped, finished, prolonged, or left half done goes on from where it stood."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.stages import text_samples

_CLOCK = ("time", "train/tokens_per_second", "train/data_wait_share", "goodput/")


def _lines(run: Path):
    """The metrics of a run as text (NaN equals NaN), without what the clock says."""
    lines = read_metrics(run / "metrics.jsonl")
    return [
        json.dumps({k: v for k, v in line.items() if not k.startswith(_CLOCK)}) for line in lines
    ]


def _signal_at(monkeypatch, step, number):
    """A signal comes while the samples of `step` are written, once."""
    append, sent = text_samples.append_samples, []

    def append_samples(path, at, samples):
        append(path, at, samples)
        if at == step and not sent:
            sent.append(at)
            signal.raise_signal(number)

    monkeypatch.setattr(text_samples, "append_samples", append_samples)


def test_a_signal_saves_and_ends_with_75_and_the_same_command_goes_on(
    command, finished_run, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    _signal_at(monkeypatch, 4, signal.SIGTERM)
    stopped = command("pretrain", run)
    assert stopped.code == 75
    message = stopped.err.splitlines()[-1]
    assert message == (
        "jaxllm: stopped by SIGTERM after step 5, which is saved; "
        "run the same command again to go on"
    )
    assert not (run / "summary.json").exists()

    assert (run / "checkpoints" / "5").is_dir()
    resumed = command("pretrain", run)
    assert resumed.code == 0
    assert "going on from step 5 of 12" in resumed.err
    assert _lines(run) == _lines(finished_run)

    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    again = command("pretrain", run)
    assert again.code == 0
    assert again.out == f"{run}: the run is finished; raise config.steps to train on.\n"
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


def test_more_steps_continue_a_finished_run(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    result = command("pretrain", run, steps=14)
    assert result.code == 0
    assert "going on from step 12 of 14" in result.err
    assert json.loads((run / "summary.json").read_text())["train/steps"] == 14
    assert json.loads((run / "config.json").read_text())["config"]["steps"] == 14
    assert _lines(run)[: len(_lines(finished_run))] == _lines(finished_run)


def test_a_run_killed_after_its_last_step_is_evaluated_and_summarised(
    command, finished_run, tmp_path
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert command("pretrain", run).code == 0
    assert _lines(run) == _lines(finished_run)
    again = json.loads((run / "summary.json").read_text())
    assert again["eval/loss"] == summary["eval/loss"]


def test_a_run_without_its_report_is_not_finished(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "report.html").unlink()
    assert command("pretrain", run).code == 0
    assert (run / "report.html").exists()


def test_fewer_steps_than_were_made_are_refused(command, finished_run):
    result = command("pretrain", finished_run, steps=8)
    assert result.code == 2
    assert "config.steps: the run has already made 12 steps" in result.err


def test_text_that_has_changed_is_refused_and_the_tokenizer_stays(
    command, corpus, finished_run, tmp_path
):
    text = shutil.copyfile(corpus, tmp_path / corpus.name)
    run = tmp_path / "run"
    assert command("pretrain", run, data__train=text, steps=4).code == 0
    tokenizer = (run / "tokenizer" / "tokenizer.json").read_bytes()
    with text.open("a") as file:
        file.write('{"text": "zzz qqq zzz qqq zzz qqq"}\n' * 30)
    result = command("pretrain", run, data__train=text, steps=8)
    assert result.code == 2
    assert "the text is not the one that the run began with" in result.err
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer


def test_a_run_begun_from_another_goes_on_without_it(command, finished_run, tmp_path):
    other = shutil.copytree(finished_run, tmp_path / "other")
    run = tmp_path / "run"
    assert command("pretrain", run, init=other, steps=4).code == 0
    shutil.rmtree(other)
    result = command("pretrain", run, init=other, steps=8)
    assert result.code == 0
    assert "going on from step 4 of 8" in result.err


def test_a_run_recorded_before_there_was_a_field_goes_on(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    recorded = json.loads((run / "config.json").read_text())
    del recorded["config"]["train"]["ema"], recorded["config"]["objective"]
    (run / "config.json").write_text(json.dumps(recorded))
    changed = command("pretrain", run, steps=13, train__ema=0.5)
    assert changed.code == 2
    assert "(config.train.ema: was 0.0, now 0.5)" in changed.err
    assert command("generate", init=run).code == 0
    result = command("pretrain", run, steps=13)
    assert result.code == 0
    assert "going on from step 12 of 13" in result.err


def test_a_broken_checkpoint_costs_the_steps_since_the_one_before(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "summary.json").unlink()
    for path in (run / "checkpoints" / "12" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            os.truncate(path, path.stat().st_size // 2)
    result = command("pretrain", run)
    assert result.code == 0
    assert "warning: checkpoint 12 cannot be read" in result.err
    assert "going on from step 8 of 12" in result.err
    assert _lines(run) == _lines(finished_run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"8", "12", "broken-12"}


def test_an_evaluation_that_fails_loses_nothing(command, tmp_path, monkeypatch):
    def broken(path, step, samples):
        raise RuntimeError("no samples today")

    with monkeypatch.context() as patched:
        patched.setattr(text_samples, "append_samples", broken)
        with pytest.raises(RuntimeError, match="no samples today"):
            command("pretrain", tmp_path / "run")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", 2, read_only=True)
    assert checkpointer.steps() == [4]
    checkpointer.close()
    resumed = command("pretrain", tmp_path / "run")
    assert resumed.code == 0
    assert "going on from step 4 of 12" in resumed.err


def test_ctrl_c_in_a_real_process(arguments, compiled, tmp_path):
    """What the tests above do in this process, with the exit code that a shell sees."""
    run = tmp_path / "run"
    fields = {"steps": 100_000, "checkpoint.every": 50_000, "eval.every": 50_000}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxllm.main", *arguments("pretrain", run, fields)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while len(read_metrics(run / "metrics.jsonl")) < 3 and time.monotonic() < end:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 75
    (saved,) = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert error.splitlines()[-1].startswith(f"jaxllm: stopped by SIGINT after step {saved},")
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == saved
