"""Masked words and prefix LM as whole runs: trained, resumed, measured, and refused."""

import json
import shutil

import pytest

from jaxllm import api
from jaxllm.errors import UserError
from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.samples import read_samples

MASKED = {"objective__kind": "masked_word", "model__causal": False}


def _summary(run):
    return json.loads((run / "summary.json").read_text())


def test_a_run_of_masked_words_learns_resumes_and_is_measured_and_does_not_write(
    command, finished_run, tmp_path
):
    run, whole = tmp_path / "run", tmp_path / "whole"
    fields = MASKED | {"optimizer__schedule": "constant", "references": True}
    assert command("pretrain", run, **fields, steps=4).code == 0
    result = command("pretrain", run, **fields)
    assert result.code == 0
    assert "cannot write: no samples" in result.err
    assert command("pretrain", whole, **fields).code == 0

    summary = _summary(run)
    assert summary["eval/loss"] == _summary(whole)["eval/loss"]
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert summary["eval/loss"] < lines[0]["train/loss"]
    # A loss of some of the tokens adds up to nothing that gzip could be compared with.
    assert not {name for name in summary if "bits_per_byte" in name or "perplexity" in name}
    assert not (run / "samples.md").exists()
    assert "held-out loss" in (run / "report.html").read_text()

    measured = command("evaluate", tmp_path / "scores", init=run, batch_size=16)
    assert measured.code == 0
    found = _summary(tmp_path / "scores")
    assert found["eval/loss"] == pytest.approx(summary["eval/loss"], rel=1e-5)
    assert "eval/bits_per_byte" not in found
    # What is predicted of the text: 15 % of it.
    whole_text = _summary(finished_run)["eval/tokens"]
    assert found["eval/tokens"] == summary["eval/tokens"]
    assert summary["eval/tokens"] == pytest.approx(0.15 * whole_text, rel=0.1)

    refused = command("generate", init=run, prompt="a")
    assert refused.code == 2
    assert "cannot continue a text" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    with pytest.raises(UserError, match="cannot continue a text"):
        api.load(run).generate(["a"])

    further = command("pretrain", tmp_path / "further", init=run, steps=1)
    assert further.code == 2
    assert "config.objective.kind: next_token would be shown" in further.err


def test_a_run_of_prefix_lm_is_measured_by_its_own_loss_and_writes(command, tmp_path):
    run = tmp_path / "run"
    assert command("pretrain", run, objective__kind="prefix_lm", steps=8).code == 0
    summary = _summary(run)
    assert "eval/bits_per_byte" not in summary
    assert {sample.step for sample in read_samples(run / "samples.md")} == {4, 8}
    assert command("evaluate", tmp_path / "scores", init=run, batch_size=16).code == 0
    found = _summary(tmp_path / "scores")
    assert found["eval/loss"] == pytest.approx(summary["eval/loss"], rel=1e-5)
    assert command("generate", init=run, prompt="a").code == 0


def test_what_cannot_be_is_refused_before_anything_is_made(command, finished_run, tmp_path):
    for fields, message in [
        ({"objective__kind": "masked_word"}, "give --config.model.causal=False"),
        ({"model__causal": False}, "next_token would be shown"),
        (
            {"objective__kind": "masked_word", "init": finished_run},
            "masked_word fills in tokens from both sides, and this model sees one side only; "
            "give --config.model.causal=False.",
        ),
        ({"objective__kind": "cloze"}, "config.objective.kind: must be one of next_token"),
    ]:
        result = command("pretrain", tmp_path / "run", **fields)
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask_is_refused_before_anything_is_made(command, tmp_path):
    vocabulary = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n"
    (tmp_path / "vocab.txt").write_text(vocabulary)
    fields = MASKED | {"tokenizer__path": tmp_path / "vocab.txt"}
    result = command("pretrain", tmp_path / "run", **fields)
    assert result.code == 2
    assert "name one of its tokens in config.tokenizer.mask_token" in result.err
    assert not (tmp_path / "run").exists()


def test_a_begun_run_of_masked_words_has_its_own_copy_of_the_tokenizer(
    command, finished_run, tmp_path
):
    tokenizer = shutil.copytree(finished_run / "tokenizer", tmp_path / "tokenizer")
    fields = MASKED | {"tokenizer__path": tokenizer}
    assert command("pretrain", tmp_path / "run", **fields, steps=2).code == 0
    shutil.rmtree(tokenizer)
    result = command("pretrain", tmp_path / "run", **fields, steps=4)
    assert result.code == 0
    assert "going on from step 2 of 4" in result.err
