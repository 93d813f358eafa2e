"""Runs that distil what is inside a teacher: its hidden states and attention, or layers of its own
that the student begins with."""

import json
import shutil

import numpy as np
import pytest


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher(layers=3)


MATCHED = {"distill__hidden_coef": 1.0, "distill__attention_coef": 1.0}


def test_a_student_becomes_like_its_teacher_inside(distil, command, curve, params_of, tmp_path):
    run = tmp_path / "run"
    fields = {**MATCHED, "distill__layer_map": "1:3", "optimizer__schedule": "constant"}
    result = distil(run, steps=24, **fields)
    assert result.code == 0, result.err
    for name in ("eval/hidden_error", "eval/attention_divergence"):
        values = list(curve(run, name).values())
        assert values[-1] < 0.9 * values[0], (name, values)
    # Projections are kept to go on with, and are no part of the model.
    step = run / "checkpoints" / "24" / "params" / "_METADATA"
    assert "projections" in step.read_text()
    assert {path.split("/")[0] for path in params_of(run)} == {"embedding", "stack_0", "final_norm"}
    written = command("generate", init=run, prompt="a")
    assert written.code == 0, written.err
    halves = tmp_path / "halves"
    assert distil(halves, steps=10, **fields).code == 0
    assert distil(halves, steps=24, **fields).code == 0
    assert curve(halves, "train/loss") == curve(run, "train/loss")


SMALL = {
    "distill__pruned_start": True,
    "distill__pruned_layers": "1,3",
    "model__layers": 2,
    "model__width": 16,
    "model__mlp_width": 32,
}
UNTRAINED = {"steps": 1, "optimizer__learning_rate": 1e-9}
"""One step that changes nothing."""


def test_a_student_can_begin_as_a_part_of_its_teacher(distil, teacher, params_of, tmp_path):
    own, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, own)
    given = {**SMALL, **UNTRAINED, "teacher__init": own}
    result = distil(run, **given)
    assert result.code == 0, result.err
    assert "the student begins as a part of" in result.err
    found, whole = params_of(run), params_of(teacher)
    np.testing.assert_allclose(found["embedding"], whole["embedding"], atol=1e-6)
    path = "stack_0/layer_0/attention/query/kernel"
    np.testing.assert_allclose(found[path], whole[path][[0, 2]], atol=1e-6)
    assert found["stack_0/layer_0/mlp/up/kernel"].shape == (2, 16, 32)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["config"]["model"]["head_dim"] == 8
    again = distil(run, **{**given, "steps": 2})
    assert again.code == 0, again.err
    shutil.rmtree(own)  # which a finished run needs no more
    finished = distil(run, **{**given, "steps": 2})
    assert finished.code == 0, finished.err


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher__top_k": 4, "model__param_dtype": "bfloat16"},
        pytest.param({"teacher__dtype": "int8", **MATCHED}, marks=pytest.mark.slow),
        pytest.param({"train__trainable": "last:1", **MATCHED}, marks=pytest.mark.slow),
        {
            **MATCHED,
            "mesh__fsdp": 2,
            "mesh__tensor": 2,
            "micro_batch_size": 8,
            "distill__on_policy_fraction": 0.5,
            "distill__max_prompt": 4,
            "temperature": 1.0,
            "optimizer__learning_rates": "projections/.*:10",
        },
    ],
)
def test_what_goes_together(fields, distil, params_of, tmp_path):
    run = tmp_path / "run"
    result = distil(run, **{**SMALL, **UNTRAINED, "batch_size": 16, **fields})
    assert result.code == 0, result.err
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(logged["train/loss"])
    assert params_of(run)["stack_0/layer_0/mlp/up/kernel"].shape[1:] == (16, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill__layer_map": "1:1"}, "nothing reads it without hidden_coef"),
        ({**MATCHED, "teacher__top_k": 4}, "teacher.top_k: of what is inside the teacher"),
        (
            {**MATCHED, "distill__layer_map": "1:9"},
            "the teacher has 3 layers, and layer 9 is named",
        ),
        ({**MATCHED, "distill__layer_map": "1-2"}, "is a list of pairs student:teacher"),
        ({"distill__hidden_coef": -1.0}, "hidden_coef: must be a number from 0 on"),
        ({"distill__pruned_start": True, "model__width": 32}, "has at most the 16 of the whole"),
        (
            {"distill__pruned_start": True, "model__layers": 3, "model__width": 16},
            "a part is smaller than the whole",
        ),
        ({"distill__pruned_layers": "1,3"}, "nothing reads it without pruned_start"),
        ({**SMALL, "distill__pruned_layers": "1-3"}, "is a list of layers, as 1,4"),
        ({**SMALL, "model__head_dim": 4}, "heads of a part are as wide as the teacher's, 8"),
        ({**SMALL, "model__rope_theta": 5.0}, "a part attends as the teacher does"),
        (
            {"distill__pruned_start": True, "model__layers": 2, "model__family": "gpt2"},
            "config.model.family: was given 'gpt2', and the parameters of config.teacher.init",
        ),
        (
            {**SMALL, "distill__pruned_layers": "2"},
            "names 1 layers, and each of the part's 2",
        ),
        ({"distill__pruned_start": True, "init": "somewhere"}, "leave one of both out"),
    ],
)
def test_what_is_refused(fields, message, distil, tmp_path):
    result = distil(tmp_path / "run", **fields)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run" / "checkpoints").exists()
