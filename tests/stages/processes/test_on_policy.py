"""Several processes write rollouts and learn from them as one does, and one goes on where they were
ended, amid a rollout."""

import json
import os
import signal

import pytest

STEPS = {
    "steps": 15,
    "checkpoint.every": 4,  # of rollouts of three updates
    "eval.every": 4,
    "rl.epochs": 3,
    "rl.kl_coef": 0.1,
    # A constant rate, so that a run of more steps begins as one of fewer does.
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 0.003,
    # With a smaller one, Adam makes a whole step of the rounding of a gradient near zero.
    "optimizer.eps": 1e-5,
}
PROMPTS = [{"prompt": f"say {n}"} for n in range(60)]
PAIRS = [
    {"prompt": f"say {n}", "chosen": "abcd"[n % 4] * 3, "rejected": "mnop"[n % 4] * (1 + n % 3)}
    for n in range(60)
]


def lines_of(run):
    """What is logged of each step, and of each evaluation; no step twice, and none left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    assert list(steps) == list(range(1, len(steps) + 1))
    assert len(steps) == sum("train/loss" in line for line in lines)
    return steps, {line["step"]: line for line in lines if "eval/reward" in line}


def check_alike(stage, one, other):
    """Checks that what both runs have logged is the same, up to rounding."""
    for (mine, theirs), names in zip(
        zip(lines_of(one), lines_of(other), strict=True),
        (
            ("rollout/reward", "rollout/length", f"{stage}/kl", "train/loss", "train/grad_norm"),
            ("eval/reward", "eval/length"),
        ),
        strict=True,
    ):
        for step in mine.keys() & theirs.keys():
            for name in names:
                # A divergence is what is left of differences of either sign.
                near = 2e-4 if name.endswith("/kl") else 2e-5
                wanted = pytest.approx(mine[step][name], rel=5e-4, abs=near)
                assert theirs[step][name] == wanted, (step, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("grpo", {"rl.group_size": 4, "lora.rank": 2, "rl.epochs": 3}),
        ("grpo", {"rl.group_size": 4, "mesh.fsdp": 2, "micro_batch_size": 8}),
        ("ppo", {"mesh.fsdp": 2, "rewards": "reward_model,regex(a)"}),
        ("ppo", {"mesh.fsdp": 2}),
    ],
    ids=["grpo_lora", "grpo", "ppo", "ppo_alone"],
)
def test_several_processes_learn_as_one_does_and_go_on_after_a_fault(
    stage, fields, arguments, start, wait_for, finished_run, json_lines, tmp_path
):
    given = {"init": finished_run, "data.train": json_lines(PROMPTS), **STEPS, **fields}
    if "reward_model" in given.get("rewards", ""):
        given["reward.init"] = tmp_path / "reward"
        of_reward = {"init": finished_run, "data.train": json_lines(PAIRS), "data.seq_len": 96}
        reward = start(arguments("reward", given["reward.init"], of_reward), 1)
        assert reward.wait(300) == [0], reward.output(0)
    one, two, halved = (tmp_path / name for name in ("one", "two", "halved"))
    alone = start(arguments(stage, one, given | {"mesh.fsdp": 1}), 1)
    assert alone.wait(300) == [0], alone.output(0)
    steps, evaluations = lines_of(one)
    assert len(steps) == 15
    assert list(evaluations) == [4, 8, 12, 15]
    assert len({line["rollout/reward"] for line in steps.values()}) > 1
    together = start(arguments(stage, two, given), 2)
    assert together.wait(300) == [0, 0], together.output(0)
    assert [each.keys() for each in lines_of(two)] == [steps.keys(), evaluations.keys()]
    check_alike(stage, one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}

    killed = start(arguments(stage, halved, given | {"steps": 2000}), 2)
    wait_for(halved / "checkpoints" / "4", killed)
    os.kill(killed.worker(1), signal.SIGKILL)
    codes = killed.wait(300)
    assert codes[0] == 75, killed.output(0)
    saved = [int(path.name) for path in (halved / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved) < 15  # so that there is something to compare
    resumed = start(arguments(stage, halved, given | {"steps": 15, "mesh.fsdp": 1}), 1)
    assert resumed.wait(300) == [0], resumed.output(0)
    assert "going on from step" in resumed.output(0)
    assert lines_of(halved)[0].keys() == steps.keys()
    check_alike(stage, one, halved)
