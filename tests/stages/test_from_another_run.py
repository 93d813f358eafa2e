"""What a later stage takes from a run, whatever machine recorded it, and what it may change."""

import json
import shutil

import pytest

from jaxllm import api
from jaxllm.checkpoints.run_directory import RunDirectory


def _recorded(run):
    return json.loads((run / "config.json").read_text())["config"]["model"]


def test_a_run_of_a_device_with_other_attention_is_used_here(command, finished_run, tmp_path):
    other = shutil.copytree(finished_run, tmp_path / "other")
    recorded = json.loads((other / "config.json").read_text())
    recorded["config"]["model"] |= {"attention": "cudnn", "remat": "full"}
    (other / "config.json").write_text(json.dumps(recorded))
    expected = command("generate", init=finished_run, prompt="a").out
    assert command("generate", init=other, prompt="a").out == expected
    assert command("evaluate", init=other).code == 0
    api.load(other)
    run = tmp_path / "run"
    assert command("pretrain", run, init=other, steps=1).code == 0
    assert _recorded(run) == _recorded(finished_run)


def test_what_changes_no_shape_may_be_given(command, finished_run, tmp_path):
    given = {"rope_theta": 500.0, "logit_soft_cap": 20.0, "param_dtype": "bfloat16"}
    fields = {f"model__{name}": value for name, value in given.items()}
    run = tmp_path / "run"
    assert command("pretrain", run, init=finished_run, steps=1, **fields).code == 0
    assert _recorded(run) == _recorded(finished_run) | given
    assert command("pretrain", run, init=finished_run, steps=2, **fields).code == 0


def test_a_causal_model_learns_to_fill_in(command, finished_run, tmp_path):
    fields = {"objective__kind": "masked_word", "model__causal": False, "init": finished_run}
    assert command("pretrain", tmp_path / "run", steps=1, **fields).code == 0
    assert not _recorded(tmp_path / "run")["causal"]


def test_another_shape_is_refused_by_name(command, finished_run, tmp_path):
    result = command("pretrain", tmp_path / "run", init=finished_run, model__width=32)
    assert result.code == 2
    assert (
        "config.model.width: was given 32, and the parameters of config.init are of 16"
        in result.err
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["pretrain", "evaluate", "generate"])
def test_a_directory_without_a_model_is_told(command, stage, tmp_path):
    other = RunDirectory(tmp_path / "tokenizer")
    other.open({})
    other.begin({"stage": "tokenizer"})
    result = command(stage, tmp_path / "run", init=other.path)
    assert result.code == 2
    (line,) = result.err.strip().splitlines()
    assert "tokenizer: is of the stage 'tokenizer', which trains no model; give" in line
    assert not (tmp_path / "run").exists()
