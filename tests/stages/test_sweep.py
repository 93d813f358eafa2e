"""Sweeps: runs are planned, made as processes, found again, and what fails is told."""

import json

import pytest

from jaxllm import trees
from jaxllm.errors import UserError
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


@pytest.mark.parametrize("size", ["2x100", "2x64x5"])
def test_a_size_that_cannot_be_is_told(size, tmp_path):
    with pytest.raises(UserError, match=rf"config\.sweep\.sizes: {size} with \d heads"):
        sweep.make(SweepConfig(sizes=f"2x32,{size}", budgets="1e10"), BASE, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sizes": "1x32,1x32", "budgets": "1e9"}, "sizes: 1x32 stands there twice"),
        ({"sizes": "1x32", "budgets": "0"}, "budgets: '0' is no number above 0"),
        ({"sizes": "1x32", "budgets": "1e9", "at_once": 0}, "at_once: must be at least 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_told(fields, told):
    with pytest.raises(ValueError, match=told):
        SweepConfig(**fields)


@pytest.mark.slow
def test_a_sweep_of_two_sizes(command, corpus, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
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
    changed = command("scaling", tmp_path / "laws", **fields | {"pretrain.batch_size": 8})
    assert changed.code == 2
    assert "holds a run of another configuration" in changed.err
    assert "config.pretrain.batch_size: was 4, now 8" in changed.err
    fewer = command("scaling", tmp_path / "laws", **fields | {"sweep.sizes": "1x16x2,1x24x2"})
    assert fewer.code == 2
    assert "approach 3 needs at least 6 runs, and there are 4" in fewer.err
