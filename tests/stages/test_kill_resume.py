"""Runs killed by SIGKILL and started again equal, bit for bit, one that was left alone."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxllm.checkpoints.run_directory import RunDirectory

_SCRIPT = Path(__file__).parents[2] / "experiments" / "kill_resume" / "run.py"


@pytest.fixture(scope="module")
def kill_resume():
    spec = importlib.util.spec_from_file_location("kill_resume", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_device(monkeypatch):
    """Processes started here see one device, and so start and step faster."""
    monkeypatch.setenv("XLA_FLAGS", "")


def _run(kill_resume, arguments, workdir, kills, steps, every, capsys):
    config, *fields = arguments(
        "pretrain",
        fields={
            "steps": steps,
            "checkpoint.every": every,
            "eval.every": 2 * every,
            "log.every": 1,
            # Large enough for the write of a checkpoint to take a while.
            "model.width": 64,
        },
    )
    code = kill_resume.main([config, f"--workdir={workdir}", f"--kills={kills}", *fields])
    return code, capsys.readouterr().out


def test_killed_in_a_checkpoint_and_resumed_equals_uninterrupted(
    kill_resume, arguments, one_device, tmp_path, capsys
):
    code, out = _run(kill_resume, arguments, tmp_path, 1, 12, 4, capsys)
    assert code == 0, out
    assert "half written" in out
    assert out.splitlines()[-1] == "equal"
    # What the comparison saw: every step logged once, in order.
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    trained = [record["step"] for record in map(json.loads, lines) if "train/loss" in record]
    assert trained == list(range(1, 13))


@pytest.mark.slow
def test_killed_at_three_moments_and_resumed_equals_uninterrupted(
    kill_resume, arguments, one_device, tmp_path, capsys
):
    code, out = _run(kill_resume, arguments, tmp_path, 3, 60, 10, capsys)
    assert code == 0, out
    assert out.count("logged") == 3
    assert "half written" in out


def test_the_comparison_sees_a_changed_metric_and_a_changed_parameter(
    kill_resume, finished_run, tmp_path, monkeypatch
):
    shutil.copytree(finished_run, tmp_path / "copy")
    one, other = RunDirectory(finished_run), RunDirectory(tmp_path / "copy")
    assert kill_resume.differences(one, other) == []

    lines = other.metrics.read_text().splitlines()
    record = json.loads(lines[3])
    changed = [*lines[:3], json.dumps(record | {"time": 1e9}), *lines[4:]]
    other.metrics.write_text("\n".join(changed) + "\n")
    assert kill_resume.differences(one, other) == []
    changed[3] = json.dumps(record | {"train/loss": np.nextafter(record["train/loss"], 9)})
    other.metrics.write_text("\n".join(changed) + "\n")
    (found,) = kill_resume.differences(one, other)
    assert found.startswith("metrics.jsonl:4:")
    other.metrics.write_text("\n".join(lines[:-1]) + "\n")
    assert len(kill_resume.differences(one, other)) == 1
    other.metrics.write_text("\n".join(lines) + "\n")

    read = kill_resume._arrays

    def with_one_bit_changed(path):
        arrays = read(path)
        if path.is_relative_to(other.path) and path.name == "params":
            first = next(iter(arrays))
            arrays[first] = np.nextafter(arrays[first], 9, dtype=np.float32)
        return arrays

    monkeypatch.setattr(kill_resume, "_arrays", with_one_bit_changed)
    (found,) = kill_resume.differences(one, other)
    assert "params" in found
