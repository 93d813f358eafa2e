"""Several processes learn of a teacher as one does, and one goes on where they were ended."""

import json

import pytest

STEPS = {
    "steps": 8,
    "checkpoint.every": 4,
    "eval.every": 4,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 0.003,
    # With a smaller one, Adam makes a whole step of the rounding of a gradient near zero.
    "optimizer.eps": 1e-5,
}
NAMES = ("train/loss", "train/divergence", "train/grad_norm", "eval/divergence", "eval/loss")


def scores(run):
    """What is logged, by step and name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in NAMES if name in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"teacher.dtype": "bfloat16", "mesh.fsdp": 2},
        {"teacher.top_k": 16},
        {
            "distill.on_policy_fraction": 0.5,
            "temperature": 1.0,
            "distill.max_prompt": 6,
            "max_new_tokens": 10,
        },
    ],
    ids=["live", "kept", "on_policy"],
)
def test_several_processes_learn_as_one_does(fields, arguments, start, finished_run, tmp_path):
    given = {"teacher.init": finished_run, **STEPS, **fields}
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(arguments("distill", one, given | {"mesh.fsdp": 1}), 1)
    assert alone.wait(300) == [0], alone.output(0)
    for steps in (4, 8):
        together = start(arguments("distill", two, given | {"steps": steps}), 2)
        assert together.wait(300) == [0, 0], together.output(0)
    expected, found = scores(one), scores(two)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=5e-4, abs=2e-5)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
