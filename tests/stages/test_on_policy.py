"""Runs that learn from their own responses through the command: GRPO and PPO."""

import json

import numpy as np
import pytest

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.reporting.samples import read_samples
from jaxllm.sharding.mesh import MeshConfig, make_mesh

WAYS = {
    "grpo": {"rl__group_size": 4},
    "grpo_reused": {
        "rl__group_size": 4,
        "rl__epochs": 2,
        "rl__minibatches": 2,
        "rl__kl_coef": 0.01,
        "grpo__kl_loss": 0.01,
    },
    "ppo": {"rl__epochs": 2, "rl__minibatches": 2, "batch_size": 8, "rl__kl_target": 3.0},
    "ppo_shared": {"rl__minibatches": 1, "rl__epochs": 2, "value__shared": True},
}


@pytest.fixture(scope="module")
def prompts(json_lines):
    return json_lines([{"prompt": f"say {n}", "answer": "abcd"[n % 4]} for n in range(60)])


@pytest.fixture
def learn(command, finished_run, prompts):
    def run(way, workdir, **fields):
        stage = way.split("_")[0]
        given = {"init": finished_run, "data__train": prompts, **WAYS.get(way, {}), **fields}
        return command(stage, workdir, **given)

    return run


def parameters(run):
    """Those of the language model."""
    params = load_model(run, make_mesh(MeshConfig())).params
    leaves = trees.leaves_with_paths(trees.divide(params, "head/.*")[1])
    return {path: np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_earns_more(way, learn, command, curve, finished_run, tmp_path):
    run = tmp_path / "run"
    result = learn(way, run, steps=48, eval__every=24, checkpoint__every=24)
    assert result.code == 0, result.err
    rewards = list(curve(run, "rollout/reward").values())
    assert len(rewards) == 48
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4])
    updates = WAYS[way].get("rl__epochs", 1) * WAYS[way].get("rl__minibatches", 1)
    ratios = curve(run, "train/ratio_variance")
    for step in range(1, 49, updates):  # as the policy is at the rollout
        assert ratios[step] < 1e-10
    assert max(curve(run, "rollout/logprob_gap").values()) < 1e-4
    if "kl_coef" in str(WAYS[way]) or way.startswith("ppo"):
        kl = curve(run, f"{way.split('_')[0]}/kl")
        assert abs(kl[1]) < 1e-5
        assert kl[48] > 1e-3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval/reward"] == pytest.approx(curve(run, "eval/reward")[48])
    samples = [sample for sample in read_samples(run / "samples.md") if sample.step == 48]
    assert len(samples) == 3
    for sample in samples:
        assert sample.prompt.startswith("say ")
        assert sample.score == ("a" in sample.text)
    # What it has made is a language model like that it began from.
    after, before = parameters(run), parameters(finished_run)
    assert after.keys() == before.keys()
    assert any((after[path] != before[path]).any() for path in after)
    assert command("generate", init=run, prompt="a").code == 0


@pytest.mark.parametrize("way", ["grpo_reused", "ppo"])
def test_a_run_that_goes_on_amid_a_rollout_is_the_uninterrupted_one(way, learn, curve, tmp_path):
    fields = {"optimizer__schedule": "constant"}
    assert learn(way, tmp_path / "whole", steps=10, **fields).code == 0
    assert learn(way, tmp_path / "halves", steps=6, **fields).code == 0
    assert learn(way, tmp_path / "halves", steps=10, **fields).code == 0
    lines = [
        [json.loads(line) for line in (tmp_path / half / "metrics.jsonl").read_text().splitlines()]
        for half in ("whole", "halves")
    ]
    timed = ("time", "train/tokens_per_second", "train/data_wait_share")

    def told(line):
        return {n: v for n, v in line.items() if n not in timed and not n.startswith("goodput")}

    whole, halves = ([told(line) for line in each if "train/loss" in line] for each in lines)
    assert halves == whole
    one, other = (parameters(tmp_path / half) for half in ("whole", "halves"))
    assert all((one[path] == other[path]).all() for path in one)


@pytest.mark.parametrize(
    ("way", "fields", "told"),
    [
        ("grpo", {"rl__group_size": 1}, "config.rl.group_size: group compares"),
        ("grpo", {"rl__group_size": 3}, "config.rl.group_size: 3 does not divide the 16"),
        ("grpo", {"top_k": 5}, "config.top_k"),
        ("grpo", {"temperature": 0.0}, "config.temperature: must be positive"),
        ("grpo", {"rewards": ""}, "config.rewards: say what responses are worth"),
        ("grpo", {"rewards": "no_such"}, "config.rewards: no_such"),
        ("grpo", {"rewards": "reward_model"}, "config.rewards: reward_model"),
        ("ppo", {"reward__init": "nowhere"}, "nowhere"),
        ("ppo", {"rl__max_prompt": 1}, "config.rl.max_prompt=1 tokens; make it larger"),
        ("ppo", {"rl__kl_coef": 0.0, "rl__kl_target": 1.0}, "config.rl.kl_target"),
    ],
)
def test_what_is_wrong_is_told(way, fields, told, learn, tmp_path):
    result = learn(way, tmp_path / "run", **fields)
    assert result.code == 2
    assert told in result.err
    assert "Traceback" not in result.err


def test_a_verifier_without_an_answer_names_the_prompt(learn, json_lines, tmp_path):
    bare = json_lines([{"prompt": f"say {n}"} for n in range(60)])
    result = learn("grpo", tmp_path / "run", data__train=bare, rewards="numeric")
    assert result.code == 2
    assert "the reward numeric" in result.err
    assert "`answer`" in result.err
    assert "say" in result.err


def test_several_answers_to_what_is_held_out(learn, curve, tmp_path):
    """pass@k and majority vote."""
    fields = {"rl__eval_samples": 4, "rl__eval_temperature": 1.0, "steps": 1, "eval__every": 1}
    result = learn("grpo", tmp_path / "run", **fields, rewards="regex(a),format:0.5")
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("regex", "format"):
        once, best, commonest = (
            summary[f"eval/rewards/{name}{which}"] for which in ("", "/best_of_4", "/majority_of_4")
        )
        assert once <= best <= 1
        assert 0 <= commonest <= best
    assert 0 < summary["eval/rewards/regex"] < summary["eval/rewards/regex/best_of_4"]
    one, half = (summary[f"eval/rewards/{name}"] for name in ("regex", "format"))
    assert summary["eval/reward"] == pytest.approx(one + 0.5 * half)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_stop_string_ends_a_response(stage, learn, curve, tmp_path):
    """And is an end, though its tokens are not in the text."""
    fields = {"stop": "a", "rewards": "regex(a)", "steps": 2, "eval__every": 2}
    result = learn(stage, tmp_path / "run", **fields)
    assert result.code == 0, result.err
    assert set(curve(tmp_path / "run", "rollout/reward").values()) == {0.0}
    assert max(curve(tmp_path / "run", "rollout/eos_rate").values()) > 0
    assert max(curve(tmp_path / "run", "rollout/logprob_gap").values()) < 1e-4


def test_equal_rewards_change_nothing(learn, finished_run, tmp_path):
    result = learn("grpo", tmp_path / "run", rewards="regex(pattern='zzzz')", steps=3)
    assert result.code == 0, result.err
    before, after = parameters(finished_run), parameters(tmp_path / "run")
    # But for the decay of weights.
    assert all(np.allclose(before[path], after[path], rtol=1e-2, atol=1e-6) for path in before)
    filtered = {"grpo__filter_groups": True, "steps": 3}
    assert learn("grpo", tmp_path / "two", rewards="regex(pattern='zzzz')", **filtered).code == 0
    after = parameters(tmp_path / "two")
    assert all((before[path] == after[path]).all() for path in before)
