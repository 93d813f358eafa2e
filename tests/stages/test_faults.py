"""Runs that are killed, stopped or damaged and started again equal one that was left alone."""

import importlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from jaxllm.checkpoints.run_directory import RunDirectory

_FOLDER = Path(__file__).parents[2] / "experiments" / "faults"


@pytest.fixture
def campaign(monkeypatch, tmp_path, capsys):
    """Runs the campaign in a folder; gives its exit code, what each run came to, and the text."""
    monkeypatch.syspath_prepend(str(_FOLDER))
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        code = importlib.import_module("run").main([f"--workdir={tmp_path}", *arguments])
        lines = (tmp_path / "outcomes.jsonl").read_text().splitlines()
        outcomes = [json.loads(line) for line in lines]
        # A run that came to its end before its fault is told too, and drawn anew.
        hit = [outcome for outcome in outcomes if not outcome["missed"]]
        return code, hit, capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def comparing(monkeypatch):
    monkeypatch.syspath_prepend(str(_FOLDER))
    return importlib.import_module("comparing")


def test_a_run_that_is_killed_and_loses_a_checkpoint_comes_to_the_same_end(campaign):
    arguments = ("--processes=1", "--only=kill,truncated", "--runs=2", "--most=1", "--changing=0")
    code, outcomes, out = campaign(*arguments)
    assert code == 0, out
    assert {outcome["fault"] for outcome in outcomes} == {"kill", "truncated"}
    for outcome in outcomes:
        assert len(outcome["fallen"]) == 1
        assert len(outcome["ends"]) == 2
        assert outcome["problems"] == []


@pytest.mark.slow  # tests/stages/processes has its like
def test_a_run_of_two_processes_outlives_the_loss_of_one(campaign):
    arguments = ("--processes=2", "--only=kill-one", "--runs=1", "--most=1", "--changing=0")
    code, outcomes, out = campaign(*arguments)
    assert code == 0, out
    (outcome,) = outcomes
    first, *_, last = outcome["ends"]
    assert last["codes"] == [0, 0]
    assert 75 in first["codes"]
    assert first["apart"] < 60


@pytest.mark.slow
def test_faults_of_many_kinds_over_one_and_two_processes(campaign):
    code, outcomes, out = campaign("--processes=1,2", "--runs=8", "--seed=1", "--most=1")
    assert code == 0, out
    assert len(outcomes) == 8


def test_the_comparison_sees_a_changed_metric_a_line_too_few_or_twice_and_a_changed_parameter(
    comparing, finished_run, tmp_path, monkeypatch
):
    shutil.copytree(finished_run, tmp_path / "copy")
    one, other = RunDirectory(finished_run), RunDirectory(tmp_path / "copy")
    assert comparing.differences(one, other) == []

    lines = other.metrics.read_text().splitlines()
    record = json.loads(lines[3])

    def difference(*changed, **options):
        other.metrics.write_text("\n".join(changed) + "\n")
        return comparing.differences(one, other, **options)

    assert difference(*lines[:3], json.dumps(record | {"time": 1e9}), *lines[4:]) == []
    loss = np.nextafter(record["train/loss"], 9)
    changed = [*lines[:3], json.dumps(record | {"train/loss": loss}), *lines[4:]]
    (found,) = difference(*changed)
    assert found.startswith("metrics.jsonl:4:")
    assert difference(*changed, tolerance=1e-6) == []
    assert len(difference(*lines[:-1])) == 1
    assert len(difference(*lines[:4], *lines[3:])) >= 1
    assert difference(*lines) == []

    read = comparing._arrays

    def with_one_bit_changed(path):
        arrays = read(path)
        if path.is_relative_to(other.path) and path.name == "params":
            first = next(iter(arrays))
            arrays[first] = np.nextafter(arrays[first], 9, dtype=np.float32)
        return arrays

    monkeypatch.setattr(comparing, "_arrays", with_one_bit_changed)
    (found,) = comparing.differences(one, other)
    assert "params" in found
    assert comparing.differences(one, other, tolerance=1e-3) == []
