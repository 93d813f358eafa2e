"""From text to a trained run: what a run directory holds, and beginning from another run."""

import json
import re

import jax
import numpy as np
import pytest

from jaxllm.checkpoints.load import load_model
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.samples import read_samples
from jaxllm.sharding.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def _params(run, mesh):
    with jax.set_mesh(mesh):
        return jax.device_get(load_model(run, mesh).params)


def test_the_run_directory_is_whole(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.json",
        "tokenizer",
        "checkpoints",
        ".lock",
        "goodput.json",
        "metrics.jsonl",
        "tensorboard",
        "samples.md",
        "report.html",
        "summary.json",
        "store",
    }
    assert {sample.step for sample in read_samples(finished_run / "samples.md")} == {4, 8, 12}


def test_the_summary_names_what_was_reached(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert all(isinstance(value, float) for value in summary.values())
    assert summary.keys() >= {
        "eval/loss",
        "eval/perplexity",
        "eval/bits_per_byte",
        "eval/tokens",
        "eval/bytes",
        "data/train_documents",
        "data/bad_lines",
        "model/parameters",
        "train/tokens",
        "train/tokens_per_second",
        "train/data_wait_share",
        "train/skipped",
        "time/total",
    }
    assert summary["data/train_documents"] + summary["data/eval_documents"] == 60
    assert summary["train/tokens"] == 12 * 8 * 32
    assert summary["train/skipped"] == 0


def test_metrics_have_the_last_evaluation_and_every_step(finished_run):
    lines = read_metrics(finished_run / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    evaluated = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [4, 8, 12]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert evaluated[-1]["eval/loss"] == summary["eval/loss"]
    assert evaluated[-1]["eval/loss"] < lines[0]["train/loss"]
    assert {"train/grad_norm", "train/learning_rate", "train/skipped"} <= lines[0].keys()


def test_the_report_needs_nothing_from_elsewhere(finished_run):
    page = (finished_run / "report.html").read_text()
    assert "eval/loss" in page or "bits per byte" in page.lower()
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#)([^"'>\s]+)""", page)
    assert outside == []
    assert "@import" not in page
    assert not re.search(r"url\((?!['\"]?(?:data:|#))", page)


def test_references_are_measured_on_request(command, tmp_path):
    assert command("pretrain", tmp_path / "run", references=True, steps=1).code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert any("gzip" in name for name in summary)


def test_samples_are_as_long_as_the_learned_positions_allow(command, tmp_path):
    model = {"model__positions": "learned", "model__max_positions": 32}
    fields = model | {"steps": 1, "max_new_tokens": 40}
    result = command("pretrain", tmp_path / "refused", prompt="0123456789" * 4, **fields)
    assert result.code == 2
    assert "config.prompt: 41 tokens are more than the 32 that the model sees at once" in result.err
    assert not (tmp_path / "refused" / "config.json").exists()
    assert command("pretrain", tmp_path / "run", **fields).code == 0
    assert {sample.step for sample in read_samples(tmp_path / "run" / "samples.md")} == {1}


def test_a_run_begins_from_the_weights_model_and_tokenizer_of_another(
    command, finished_run, mesh, tmp_path
):
    run = tmp_path / "further"
    # Nothing moves, so that the parameters are still those it began from.
    result = command(
        "pretrain",
        run,
        init=finished_run,
        steps=1,
        optimizer__learning_rate=0.0,
        model__remat="full",
    )
    assert result.code == 0
    before, after = _params(finished_run, mesh), _params(run, mesh)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    configs = [
        json.loads((path / "config.json").read_text())["config"] for path in (finished_run, run)
    ]
    # How the model is computed is the run's own choice; its shape is not.
    assert configs[1]["model"] == configs[0]["model"] | {"remat": "full"}
    tokenizers = [(path / "tokenizer" / "tokenizer.json") for path in (finished_run, run)]
    assert tokenizers[0].read_text() == tokenizers[1].read_text()
    losses = [
        json.loads((path / "summary.json").read_text())["eval/loss"] for path in (finished_run, run)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    first = read_metrics(run / "metrics.jsonl")[0]["train/loss"]
    beginning = read_metrics(finished_run / "metrics.jsonl")[0]["train/loss"]
    assert abs(first - losses[0]) < (beginning - losses[0]) / 2


def test_another_seed_gives_another_run(command, finished_run, tmp_path):
    assert command("pretrain", tmp_path / "run", seed=1, steps=1).code == 0
    first, other = (
        read_metrics(run / "metrics.jsonl")[0]["train/loss"]
        for run in (finished_run, tmp_path / "run")
    )
    assert first != other
