"""`metrics.jsonl` through kills, full disks and resumes."""

import json
import math
import os
import resource
import signal

import pytest
from absl import logging

from jaxllm.reporting.metrics_file import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_lines_come_back(path):
    metrics = MetricsFile(path)
    metrics.append(10, 1.23456, {"train/loss": 3.5})
    metrics.append(20, 2.0, {"eval/bits_per_byte": 1.5, "名": 1})
    assert read_metrics(path) == [
        {"step": 10, "time": 1.235, "train/loss": 3.5},
        {"step": 20, "time": 2.0, "eval/bits_per_byte": 1.5, "名": 1.0},
    ]


def test_every_line_is_strict_json_also_when_training_diverges(path):
    MetricsFile(path).append(1, 0.0, {"a": math.nan, "b": math.inf, "c": 1.0})
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["a"] is None and record["b"] is None
    assert math.isnan(read_metrics(path)[0]["a"])


def test_a_half_line_is_passed_over_and_healed(path):
    MetricsFile(path).append(1, 0.0, {"a": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 2, "ti')
    assert steps(path) == [1]
    MetricsFile(path).append(3, 0.0, {"a": 1.0})
    assert steps(path) == [1, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_only_half_a_line(path):
    path.write_text('{"st')
    MetricsFile(path).append(1, 0.0, {})
    assert steps(path) == [1]


def test_truncation_leaves_the_restored_step_and_no_broken_lines(path):
    metrics = MetricsFile(path)
    for step in (1, 2, 3, 4):
        metrics.append(step, 0.0, {"a": step})
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join([whole[0], "not json\n", '"no object"\n', *whole[1:], '{"step": 2']))
    metrics.truncate_after(2)
    assert path.read_text() == whole[0] + whole[1]
    metrics.append(3, 0.0, {})
    assert steps(path) == [1, 2, 3]


def test_truncation_without_need_or_file_changes_nothing(path):
    MetricsFile(path).truncate_after(5)
    assert not path.exists()
    MetricsFile(path).append(1, 0.0, {})
    before = os.stat(path)
    MetricsFile(path).truncate_after(5)
    assert os.stat(path).st_ino == before.st_ino and os.listdir(path.parent) == [path.name]


def test_a_full_disk_warns_once_and_its_lines_are_written_later(path, monkeypatch):
    """A limit on file size stands in for the disk: the write stops in the middle of a line."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *arguments: warnings.append(arguments))
    metrics = MetricsFile(path)
    metrics.append(1, 0.0, {"a": 1.0})
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
        metrics.append(2, 0.0, {"a": 1.0})
        metrics.append(3, 0.0, {"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert len(warnings) == 1
    assert path.stat().st_size == size
    metrics.flush()
    assert steps(path) == [1, 2, 3]
    metrics.append(4, 0.0, {"a": 1.0})
    assert steps(path) == [1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 4


def test_no_file_reads_as_no_lines(path):
    assert read_metrics(path) == []
