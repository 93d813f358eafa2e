"""Several processes fine-tune as one does, and one goes on where they were ended."""

import json
import os
import signal

import pytest

# A constant rate, so that a run of more steps begins as one of fewer does; and a low one, as at a
# higher one rounding grows to more than is allowed.
STEPS = {
    "steps": 24,
    "checkpoint.every": 8,
    "eval.every": 8,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 0.003,
}

INSTRUCTIONS = [{"prompt": f"Say {n}", "response": f"yes {n}"} for n in range(80)]
# Each class has a letter of its own, but a fifth of the texts that of another: scores are below 1,
# and would show texts that are left out or counted twice.
LABELLED = [
    {"text": f"{'abcd'[(n + (n % 5 == 0)) % 4] * 3} {n}", "label": f"class {n % 4}"}
    for n in range(80)
]


PAIRS = [
    {
        "prompt": f"Say {n}",
        "chosen": "abcd"[n % 4] * 3,
        "rejected": "mnop"[n // 4 % 4] * (1 + n % 4),
    }
    for n in range(80)
]


def scores_of(run):
    summary = json.loads((run / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name.startswith("eval/")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "records", "fields", "scores"),
    [
        ("sft", INSTRUCTIONS, {"lora.rank": 2, "lora.dropout": 0.1}, {"eval/loss"}),
        ("sft", INSTRUCTIONS, {"sft.layout": "chat", "mesh.fsdp": 2}, {"eval/loss"}),
        (
            "classify",
            LABELLED,
            {"mesh.fsdp": 2},
            {"eval/accuracy", "eval/macro_f1", "eval/loss"},
        ),
        (
            "reward",
            PAIRS,
            {"data.seq_len": 48},
            {"eval/accuracy", "eval/loss", "eval/calibration_error"},
        ),
        (
            "dpo",
            PAIRS,
            {"data.seq_len": 48, "mesh.fsdp": 2},
            {"eval/accuracy", "eval/loss", "eval/log_ratio"},
        ),
        (
            "dpo",
            PAIRS,
            {"data.seq_len": 48, "dpo.loss": "kto", "lora.rank": 2, "micro_batch_size": 4},
            {"eval/accuracy", "eval/loss", "eval/margin"},
        ),
    ],
    ids=["lora", "sft", "classify", "reward", "dpo", "kto"],
)
def test_several_processes_fine_tune_as_one_does_and_go_on_after_a_fault(
    arguments,
    start,
    wait_for,
    finished_run,
    same_curve,
    curve,
    json_lines,
    tmp_path,
    stage,
    records,
    fields,
    scores,
):
    given = {"init": finished_run, "data.train": json_lines(records), **STEPS, **fields}
    one, two, halved = (tmp_path / name for name in ("one", "two", "halved"))
    alone = start(arguments(stage, one, given | {"mesh.fsdp": 1}), 1)
    assert alone.wait() == [0], alone.output(0)
    together = start(arguments(stage, two, given), 2)
    assert together.wait() == [0, 0], together.output(0)
    same_curve(one, two)
    assert scores <= scores_of(one).keys()
    assert scores_of(two) == pytest.approx(scores_of(one), rel=1e-4)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}

    killed = start(arguments(stage, halved, given | {"steps": 2000}), 2)
    wait_for(halved / "checkpoints" / "8", killed)
    os.kill(killed.worker(1), signal.SIGKILL)
    codes = killed.wait()
    assert codes[0] == 75, killed.output(0)
    saved = [int(path.name) for path in (halved / "checkpoints").iterdir() if path.name.isdigit()]
    steps = {"steps": max(saved) + 8, "mesh.fsdp": 1}
    resumed = start(arguments(stage, halved, given | steps), 1)
    assert resumed.wait() == [0], resumed.output(0)
    assert "going on from step" in resumed.output(0)
    losses = curve(halved, "train/loss")
    assert list(losses) == list(range(1, max(saved) + 9))
    expected = curve(one, "train/loss")
    assert [losses[step] for step in expected if step in losses] == pytest.approx(
        [loss for step, loss in expected.items() if step in losses], rel=1e-4
    )
