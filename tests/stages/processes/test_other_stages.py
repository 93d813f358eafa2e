"""Stages that train nothing, on several processes: as on one, or for a single one only."""

import json

import pytest


@pytest.mark.slow
def test_models_write_and_are_measured_by_several_processes(
    arguments, start, finished_run, corpus, json_lines, tmp_path
):
    words = ("abc", "d e", "fgh ij")
    task = json_lines(
        (
            {"query": word, "choices": ["ab", "cde"], "gold": number % 2}
            for number, word in enumerate(words)
        ),
        "task",
    )
    written = {}
    for count in (1, 2):
        fields = {"init": finished_run, "prompt": "ab", "temperature": 0.0, "max_new_tokens": 16}
        processes = start(arguments("generate", None, fields), count)
        assert processes.wait() == [0] * count, processes.output(0)
        written[count] = processes.output(0).splitlines()[-1]
        workdir = tmp_path / f"scores_{count}"
        fields = {"init": finished_run, "data.eval": corpus, "tasks": task}
        processes = start(arguments("evaluate", workdir, fields), count)
        assert processes.wait() == [0] * count, processes.output(0)
        written[count] += (workdir / "items.jsonl").read_text()
        written[f"{count} scores"] = json.loads((workdir / "summary.json").read_text())
    assert written[1] == written[2]
    assert written["1 scores"] == pytest.approx(written["2 scores"], rel=1e-5)


def test_stages_that_are_for_one_process(arguments, start, finished_run, tmp_path):
    fields = {"init": finished_run}
    processes = start(arguments("export_hf", tmp_path / "out", fields), 2)
    assert processes.wait() == [2, 2]
    assert "runs as a single process" in processes.output(0)
    processes = start(arguments("prepare", tmp_path / "prepared"), 2)
    assert processes.wait() == [0, 0]
    assert (tmp_path / "prepared" / "report.html").exists()
