"""Recipes: several runs, each begun from an earlier one."""

import json

import pytest
from ml_collections import ConfigDict

from jaxllm.errors import UserError
from jaxllm.main import run


@pytest.fixture
def recipe(finished_run, json_lines):
    """A model that is tuned, and then learns from its own answers."""
    asked = json_lines([{"prompt": f"say {n}", "response": "a b c"} for n in range(60)])
    every = {"log": {"every": 1}, "checkpoint": {"every": 2}, "eval": {"every": 2}}
    data = {"data": {"train": str(asked), "eval_fraction": 0.2}, "batch_size": 8, "steps": 2}
    tuned = {"stage": "sft", "init": str(finished_run), "max_new_tokens": 4, **data, **every}
    policy = {
        "stage": "grpo",
        "init": "tuned",
        "rewards": "regex(a)",
        "rl": {"group_size": 4, "max_prompt": 48},
        "max_new_tokens": 4,
        **data,
        **every,
    }
    return {"stage": "recipe", "order": "tuned,policy", "tuned": tuned, "policy": policy}


def test_parts_begin_from_each_other_and_go_on(recipe, tmp_path, compiled, capsys):
    run(ConfigDict(recipe), tmp_path)
    begun = json.loads((tmp_path / "policy" / "config.json").read_text())["config"]
    assert begun["init"] == str(tmp_path / "tuned")
    written = (tmp_path / "tuned" / "summary.json").read_bytes()
    assert "policy: grpo, part 2 of 2" in capsys.readouterr().err
    recipe["policy"]["steps"] = 3
    # However the directory is spelt.
    run(ConfigDict(recipe), tmp_path / ".." / tmp_path.name)
    told = capsys.readouterr()
    assert "tuned: the run is finished" in told.out
    assert "going on from step 2 of 3" in told.err
    assert (tmp_path / "tuned" / "summary.json").read_bytes() == written


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"order": ""}, r"config\.order: name the parts"),
        ({"order": "tuned,other"}, r"'other' is no part"),
        ({"order": "tuned,tuned"}, "stands twice"),
        ({"policy": {"stage": "no_such"}}, r"config\.policy\.stage: 'no_such' is unknown"),
        ({"policy": {"stage": "grpo", "steps": 0}}, r"config\.policy\.steps: must be at least 1"),
        ({"policy": {"stage": "recipe"}}, r"config\.policy\.stage: 'recipe' is unknown"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_run(changed, told, recipe, tmp_path):
    with pytest.raises(UserError, match=told):
        run(ConfigDict(recipe | changed), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
