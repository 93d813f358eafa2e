"""Sweeps: runs are planned, made as processes, found again, and what fails is told."""

import json
import os
import subprocess
import sys
import time

import pytest

from jaxllm import trees
from jaxllm.errors import Preempted, UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.stages import sweep
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.stages.sweep import SweepConfig, plan
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.training.optimizer import OptimizerConfig

BASE = PretrainConfig(
    model=ModelConfig(layers=2, width=64, heads=2),
    tokenizer=TokenizerConfig(vocab_size=500),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=20),
    batch_size=8,
)


def test_what_follows_from_a_size_and_a_budget():
    planned = plan(SweepConfig(sizes="1x32,2x128x2", budgets="3e10,1e10", rate_exponent=1.0), BASE)
    assert [run.name for run in planned] == [
        "1x32-1e10",
        "2x128x2-1e10",
        "1x32-3e10",
        "2x128x2-3e10",
    ]
    for run in planned:
        model = architecture(run.config.model, 500)
        assert run.parameters == trees.size(param_shapes(model))
        assert run.tokens == run.updates * 8 * BASE.data.seq_len
        asked = float(run.name.split("-")[1])
        assert abs(run.flops - asked) <= 3 * run.parameters * 8 * BASE.data.seq_len
        assert run.config.optimizer.warmup_steps <= run.config.steps / 10
    assert [run.config.optimizer.learning_rate for run in planned[:2]] == [0.02, 0.005]
    assert [run.config.model.heads for run in planned[:2]] == [1, 2]


@pytest.fixture
def started(monkeypatch):
    """Runs are small programs rather than trainings; which began, with their slots, in order."""
    began = []

    def start(name, config, folder, slot, slots):
        began.append((name, slot))
        (folder / name).mkdir(exist_ok=True)
        with (folder / f"{name}.log").open("a") as log:
            return subprocess.Popen([sys.executable, "-c", config["code"]], stderr=log, cwd=folder)

    monkeypatch.setattr(sweep, "_started", start)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)
    return began


def program(name, end="", before=""):
    done = f"open('{name}/summary.json', 'w').write('{{\"a\": 1}}')"
    return {"code": f"import sys, time\n{before}\n{end or done}"}


def test_what_is_done_is_not_made_again(started, tmp_path):
    configs = {name: program(name) for name in "abc"}
    sweep._run_all(configs, tmp_path, 1)
    assert [name for name, _ in started] == ["a", "b", "c"]
    (tmp_path / "b" / "summary.json").unlink()
    sweep._run_all(configs, tmp_path, 1)
    assert [name for name, _ in started] == ["a", "b", "c", "b"]


def test_two_at_once_have_a_slot_each(started, tmp_path):
    met = (
        "open('{}.here', 'w')\nwhile not __import__('os').path.exists('{}.here'): time.sleep(0.01)"
    )
    configs = {
        "a": program("a", before=met.format("a", "b")),
        "b": program("b", before=met.format("b", "a")),
        "c": program("c"),
    }
    sweep._run_all(configs, tmp_path, 2)
    assert [slot for _, slot in started[:2]] == [0, 1]
    assert len(started) == 3


@pytest.mark.parametrize(
    ("end", "error", "told"),
    [
        ("sys.exit('jaxllm: config.x: is wrong')", RuntimeError, "a ended with 1; see .*a.log"),
        (
            "print('jaxllm: config.x: is wrong', file=sys.stderr); sys.exit(2)",
            UserError,
            "a: config.x",
        ),
        ("print('jaxllm: stopped', file=sys.stderr); sys.exit(75)", Preempted, "a: stopped"),
    ],
)
def test_a_run_that_fails_ends_the_sweep(started, tmp_path, end, error, told):
    configs = {"a": program("a", end), "b": program("b")}
    with pytest.raises(error, match=told):
        sweep._run_all(configs, tmp_path, 1)
    assert [name for name, _ in started] == ["a"]


def test_what_ends_the_sweep_ends_its_runs(started, tmp_path, monkeypatch):
    process = []

    def stop(seconds):
        process.append(time.monotonic())
        if len(process) > 3:
            raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(sweep.time, "sleep", stop)
    with pytest.raises(Preempted):
        sweep._run_all({"a": program("a", before="time.sleep(60)")}, tmp_path, 1)
    assert not (tmp_path / "a" / "summary.json").exists()
    assert time.monotonic() - process[0] < 30


def test_runs_share_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,5")
    assert sweep._share_of_gpus(1, 2) == {"CUDA_VISIBLE_DEVICES": "1,3"}
    assert sweep._share_of_gpus(0, 1) == {}
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
        given = []
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: given.append(cores))
        sweep._share_of_cores(1, 2)()
        assert given == [[1]]
        assert sweep._share_of_cores(0, 1) is None
        assert sweep._share_of_cores(3, 4) is None


@pytest.mark.slow
def test_a_sweep_of_two_sizes(command, corpus, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    fields = {
        "pretrain.data.train": corpus,
        "pretrain.data.eval_fraction": 0.2,
        "pretrain.data.seq_len": 32,
        "pretrain.tokenizer.vocab_size": 300,
        "pretrain.batch_size": 4,
        "pretrain.references": False,
        "pretrain.max_new_tokens": 4,
        "sweep.min_updates": 1,
        "sweep.evaluations": 3,
        "sweep.at_once": 2,
        "sweep.sizes": "1x16x2,1x24x2,1x32x2",
        "sweep.budgets": "1e8,1.6e8,3e12",
        "scaling.approaches": "parametric",
        "scaling.samples": 10,
    }
    result = command("scaling", tmp_path / "laws", **fields)
    assert result.code == 0, result.err
    assert result.err.count("left out: too many epochs") == 3
    assert sorted(path.name for path in (tmp_path / "laws" / "runs").glob("*/")) == sorted(
        f"{size}-{budget}"
        for size in ("1x16x2", "1x24x2", "1x32x2")
        for budget in ("1e08", "1.6e08")
    )
    assert json.loads((tmp_path / "laws" / "summary.json").read_text())["scaling/runs"] == 6
    again = command("scaling", tmp_path / "laws", **fields)
    assert again.code == 0
    assert again.err.count("done") == 6
    assert "run 1 of" not in again.err
