"""What on-policy runs are given and cannot use, or that teaches nothing: it is told in a line."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.errors import UserError
from jaxllm.inference.reward_model import RewardModel
from jaxllm.main import main
from jaxllm.main import run as run_config
from jaxllm.rollouts.judging import Judge
from jaxllm.sharding.mesh import MeshConfig, make_mesh

REWARD_MODULE = """
import math


def not_of_seven(prompts, responses, records):
    return [math.nan if record["number"] == 7 else 1.0 for record in records]


def a_tenth(prompts, responses, records):
    return [0.1] * len(prompts)


def letters(prompts, responses, records):
    return [response.count("a") for response in responses]
"""


@pytest.fixture(scope="module")
def prompts(json_lines):
    records = [{"prompt": f"say {n}", "answer": "abcd"[n % 4], "number": n} for n in range(60)]
    return json_lines(records)


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """The name of a module with reward functions."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "rewards_of_these_tests.py").write_text(REWARD_MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return "rewards_of_these_tests"


@pytest.fixture
def learn(command, finished_run, prompts):
    def run(stage, workdir, **fields):
        given = {"init": finished_run, "data__train": prompts, "rl__group_size": 4, "steps": 2}
        return command(stage, workdir, **given | fields)

    return run


@pytest.fixture
def refused(learn, tmp_path):
    """Runs what is wrong; the one line that tells so."""

    def run(stage, **fields):
        result = learn(stage, tmp_path / "refused", **fields)
        assert result.code == 2
        assert "Traceback" not in result.err
        (line,) = [line for line in result.err.splitlines() if line.startswith("jaxllm: ")]
        assert result.err.endswith(f"{line}\n")
        return line

    return run


@pytest.fixture(scope="module")
def of_bytes(arguments, compiled, corpus, json_lines, tmp_path_factory):
    """Runs of the stages `pretrain` and `reward` whose tokens are bytes."""
    pairs = [
        {"prompt": f"Say {n}", "chosen": "abcd"[n % 4] * 3, "rejected": "mnop"[n % 4] * (n % 3 + 1)}
        for n in range(60)
    ]
    folder = tmp_path_factory.mktemp("of_bytes")
    base, reward = folder / "base", folder / "reward"
    fields = {"tokenizer.kind": "bytes", "steps": 1, "eval.max_batches": 1}
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert main(arguments("pretrain", base, fields)) == 0
    given = {"init": base, "data.train": json_lines(pairs), "data.seq_len": 64}
    assert main(arguments("reward", reward, given)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return base, reward


def parameters(run):
    params = load_model(run, make_mesh(MeshConfig())).params
    return {path: np.asarray(leaf) for path, leaf in trees.leaves_with_paths(params)}


def test_a_single_prompt_without_an_answer_is_named(refused, json_lines):
    records = [{"prompt": f"tell {n}", "answer": f"{n}"} for n in range(12)]
    del records[5]["answer"]
    # Whether it is asked or held out, and before anything is drawn.
    line = refused("grpo", data__train=json_lines(records), rewards="exact_match", steps=1)
    assert re.search(r"the reward exact_match, prompt \d+ of 12 \(prompt 'tell 5'\): ", line)
    assert "it has no `answer`" in line


def test_a_reward_that_is_no_number_is_told_with_its_prompt(refused, own_rewards):
    line = refused("grpo", rewards=f"regex(a),{own_rewards}:not_of_seven", steps=12)
    assert re.search(r"the reward not_of_seven, response \d+ of \d+ \(prompt 'say 7'\): ", line)
    assert "it gives nan, which is no finite number; return one." in line


@pytest.mark.parametrize("group_size", [4, 6, 1])
def test_rewards_that_are_all_equal_change_nothing(
    group_size, learn, own_rewards, finished_run, curve, tmp_path
):
    """Nor does the decay of weights; and 0.1 is no binary number, the mean of six is another."""
    run = tmp_path / "run"
    fields = {"rl__group_size": group_size, "rewards": f"{own_rewards}:a_tenth"}
    fields |= {"batch_size": 24, "mesh__data": 4, "mesh__tensor": 2}
    if group_size == 1:  # which `group` refuses, as it compares them
        fields |= {"grpo__advantages": "global"}
    result = learn("grpo", run, **fields)
    assert result.code == 0, result.err
    assert curve(run, "grpo/groups_with_spread") == {1: 0.0, 2: 0.0}
    assert curve(run, "rollout/reward") == {1: pytest.approx(0.1), 2: pytest.approx(0.1)}
    assert curve(run, "train/grad_norm") == {1: 0.0, 2: 0.0}
    assert curve(run, "train/skipped")[2] == 0
    before, after = parameters(finished_run), parameters(run)
    assert all((before[path] == after[path]).all() for path in before)


def test_what_was_learnt_before_does_not_go_on_by_itself(
    learn, own_rewards, curve, monkeypatch, tmp_path
):
    """Moments of earlier updates move no parameter in one that teaches nothing."""
    run = tmp_path / "run"
    fields = {"rewards": f"{own_rewards}:letters", "optimizer__schedule": "constant"}
    assert learn("grpo", run, **fields).code == 0
    learnt = parameters(run)
    judge = Judge.__call__
    monkeypatch.setattr(
        Judge,
        "__call__",
        lambda *arguments: (lambda found: found._replace(scores=0 * found.scores))(
            judge(*arguments)
        ),
    )
    assert learn("grpo", run, **fields, steps=3).code == 0
    spread = curve(run, "grpo/groups_with_spread")
    assert spread[1] > 0
    assert spread[3] == 0
    after = parameters(run)
    assert all((learnt[path] == after[path]).all() for path in learnt)


def test_a_response_alone_is_learnt_from_where_nothing_compares_it(learn, curve, tmp_path):
    fields = {"rl__group_size": 1, "grpo__advantages": "global"}
    result = learn("grpo", tmp_path / "run", **fields)
    assert result.code == 0, result.err
    assert min(curve(tmp_path / "run", "train/grad_norm").values()) > 0


def test_a_reward_model_of_other_tokens_is_refused(refused, of_bytes):
    line = refused("grpo", reward__init=of_bytes[1], rewards="")
    assert f"config.reward.init: {of_bytes[1]} has another tokenizer than the policy" in line
    assert "config.reward.retokenise=True" in line


def test_a_reward_model_of_other_tokens_is_shown_the_text(
    learn, command, of_bytes, json_lines, monkeypatch, curve, tmp_path
):
    judged, shown = [], []
    judge, of_texts = Judge.__call__, RewardModel.__call__

    def judging(self, asked, written):
        judged.append((asked, written, judge(self, asked, written)))
        return judged[-1][-1]

    def of_model(self, prompts, responses):
        shown.append((prompts, responses))
        return of_texts(self, prompts, responses)

    monkeypatch.setattr(Judge, "__call__", judging)
    monkeypatch.setattr(RewardModel, "__call__", of_model)
    run = tmp_path / "run"
    given = {"reward__init": of_bytes[1], "reward__retokenise": True, "rewards": ""}
    result = learn("grpo", run, **given, steps=1, eval__every=1)
    assert result.code == 0, result.err
    (asked, written, found), *_ = judged
    assert shown[0][1] == [response.text for response in written]
    assert found.scores.std() > 0.01  # it tells them apart
    assert curve(run, "rollout/reward")[1] == pytest.approx(found.scores.mean(), rel=1e-5)
    assert curve(run, "eval/rewards/reward_model")[1] == pytest.approx(judged[1][2].scores.mean())
    # The stage `score` reads them from a file; it takes no empty ones.
    pairs = [
        (prompt.text, response.text, score)
        for prompt, response, score in zip(asked, written, found.scores, strict=True)
        if response.text.strip()
    ]
    assert len(pairs) > 10
    texts = json_lines([{"prompt": prompt, "response": text} for prompt, text, _ in pairs], "texts")
    assert command("score", tmp_path / "scored", init=of_bytes[1], texts=texts).code == 0
    lines = (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()
    alone = [json.loads(line)["reward"] for line in lines]
    np.testing.assert_allclose([score for *_, score in pairs], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"value__init": 0}, "config.value.init"),
        ({"value__init": 1}, "config.value.init"),
        # The value function would begin from it.
        ({"reward__init": 1}, "config.reward.init"),
        ({"reward__init": 1, "reward__retokenise": True}, "config.reward.init"),
    ],
)
def test_a_value_function_of_other_tokens_is_refused(fields, field, refused, of_bytes):
    given = {name: of_bytes[v] if name.endswith("init") else v for name, v in fields.items()}
    rewards = "reward_model" if "reward__init" in fields else "regex(a)"
    line = refused("ppo", **given, rewards=rewards)
    (run,) = {str(path) for path in given.values() if path is not True}
    assert f"{field}: {run} has another tokenizer than the policy" in line
    assert line.endswith("give one with the same as config.value.init.")


def test_a_value_function_of_the_same_tokens_beside_a_reward_model_of_others(
    learn, finished_run, of_bytes, tmp_path
):
    given = {"reward__init": of_bytes[1], "reward__retokenise": True, "value__init": finished_run}
    given["rewards"] = "reward_model"
    assert learn("ppo", tmp_path / "run", **given, steps=1).code == 0


@pytest.mark.parametrize(
    ("stage", "fields", "told"),
    [
        (
            "grpo",
            {"model__max_positions": 37},
            "config.rl.max_prompt and config.max_new_tokens: 38 tokens are more than the 37",
        ),
        (
            "ppo",
            {"model__max_positions": 37},
            "config.rl.max_prompt and config.max_new_tokens: 38 tokens are more than the 37",
        ),
        ("ppo", {"value__init": "nowhere"}, "nowhere: is no run directory"),
        ("ppo", {"value__init": "nowhere", "value__shared": True}, "config.value.init: a value"),
        ("ppo", {"model__head__outputs": 1}, "config.model.head.outputs: leave it out"),
        ("ppo", {"ppo__max_kl": -1.0}, "config.ppo.max_kl: must not be negative"),
        ("grpo", {"reference__init": "nowhere", "rl__kl_coef": 0.1}, "nowhere: is no run"),
        ("grpo", {"reference__init": "nowhere"}, "config.reference.init: nothing holds the policy"),
        (
            "grpo",
            {"grpo__filter_groups": True, "rl__kl_coef": 0.1},
            "config.grpo.filter_groups: with rl.kl_coef responses of equal scores",
        ),
        ("grpo", {"rl__overlong_buffer": 200}, "config.rl.overlong_buffer: 200 tokens are more"),
        ("grpo", {"init": ""}, "config.init: give the run directory"),
        ("ppo", {"lora__rank": 2, "train__trainable": ".*norm/scale"}, "which is the reference"),
        # Its value function would be trained, whatever is meant of the policy.
        ("ppo", {"train__trainable": "no_such"}, "config.train.trainable: the pattern 'no_such'"),
        (
            "ppo",
            {"train__trainable": "no_such", "value__shared": True},
            "config.train.trainable: the pattern 'no_such'",
        ),
        (
            "ppo",
            {
                "lora__rank": 2,
                "lora__base": "bfloat16",
                "train__trainable": ".*kernel",
                "rl__kl_coef": 0.0,
            },
            "config.lora.base: ",
        ),
        (
            "grpo",
            {"rl__group_size": 1, "grpo__advantages": "global", "grpo__filter_groups": True},
            "config.grpo.filter_groups: a group of one has no spread",
        ),
        ("grpo", {"batch_size": 12}, "config.batch_size: 12 rows cannot be divided over the 8"),
    ],
)
def test_what_cannot_be(stage, fields, told, refused):
    assert told in refused(stage, **fields)


def test_a_reference_of_other_tokens_is_refused(refused, of_bytes):
    line = refused("grpo", reference__init=of_bytes[0], rl__kl_coef=0.1)
    assert f"config.reference.init: {of_bytes[0]} has another tokenizer than the policy" in line


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"heads": 1}, "heads 1, and the policy's 2"), ({"rope_theta": 5e3}, "rope_theta 5000.0")],
)
def test_a_reference_that_is_computed_otherwise_is_refused(
    fields, told, refused, finished_run, tmp_path
):
    """Its parameters have the same shapes, and would load."""
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    recorded = json.loads((other / "config.json").read_text())
    recorded["config"]["model"] |= fields
    (other / "config.json").write_text(json.dumps(recorded))
    line = refused("grpo", reference__init=other, rl__kl_coef=0.1)
    assert f"config.reference.init: its model has {told}" in line


def test_a_value_function_that_sees_what_is_to_come_is_refused(refused, finished_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    recorded = json.loads((other / "config.json").read_text())
    recorded["config"]["model"]["causal"] = False
    (other / "config.json").write_text(json.dumps(recorded))
    line = refused("ppo", value__init=other)
    assert f"config.value.init: {other} sees both ways" in line


def test_what_is_no_reward_model_is_told(refused, finished_run):
    line = refused("ppo", reward__init=finished_run, rewards="")
    assert f"config.reward.init: {finished_run} is no run of the stage reward" in line


def test_another_reward_model_in_its_place_is_refused(learn, command, of_bytes, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(of_bytes[1], judge)
    given = {"reward__init": judge, "reward__retokenise": True, "rewards": "reward_model"}
    given["optimizer__schedule"] = "constant"
    assert learn("grpo", tmp_path / "run", **given, steps=1).code == 0
    assert learn("grpo", tmp_path / "run", **given, steps=2).code == 0
    other = tmp_path / "longer"
    shutil.copytree(of_bytes[1], other)
    pairs = json.loads((other / "config.json").read_text())["config"]["data"]["train"]
    more = {"init": of_bytes[0], "data__train": pairs, "data__seq_len": 64, "steps": 8}
    assert command("reward", other, **more).code == 0
    shutil.rmtree(judge)
    shutil.copytree(other, judge)
    result = learn("grpo", tmp_path / "run", **given, steps=3)
    assert result.code == 2
    assert f"{judge}: is not the reward model that {tmp_path / 'run'} began with" in result.err


def test_a_reward_model_that_is_no_reward_is_told(refused, of_bytes):
    line = refused("ppo", reward__init=of_bytes[1], rewards="regex(a)")
    assert "does not ask the reward model of config.reward.init; add reward_model" in line


def test_as_many_tokens_as_the_model_has_positions(learn, tmp_path):
    assert learn("grpo", tmp_path / "run", model__max_positions=38, steps=1).code == 0


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ("policy,tuned", r"config\.policy\.init: 'tuned' .* config\.order"),
        ("policy", r"config\.policy\.init: 'tuned' .* config\.order"),
        ("tuned,judged,policy", r"config\.judged\.init: 'policy' .* config\.order"),
        ("tuned,policy,own", r"config\.own\.value\.init: 'judged' .* config\.order"),
    ],
)
def test_a_recipe_that_needs_a_part_before_it_is_made(order, told, finished_run, tmp_path):
    parts = {
        "tuned": {"stage": "sft", "init": str(finished_run)},
        "policy": {"stage": "grpo", "init": "tuned", "rewards": "regex(a)"},
        "judged": {"stage": "reward", "init": "policy"},
        "own": {
            "stage": "ppo",
            "init": "tuned",
            "value": {"init": "judged"},
            "rewards": "regex(a)",
        },
    }
    recipe = {"stage": "recipe", "order": order}
    recipe |= {name: {**part, "steps": 1} for name, part in parts.items()}
    with pytest.raises(UserError, match=told):
        run_config(ConfigDict(recipe), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
