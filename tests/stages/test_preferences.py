"""Runs that learn from preferences through the command: reward models, and policies by DPO."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.sharding.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def pairs(json_lines):
    """Better and worse responses have letters of their own."""
    return json_lines(
        [
            {
                "prompt": f"Say {n}",
                "chosen": "abcd"[n % 4] * 3,
                "rejected": "mnop"[n // 4 % 4] * 3,
                "source": "odd" if n % 2 else "even",
            }
            for n in range(120)
        ],
        "pairs",
    )


@pytest.fixture
def prefer(command, finished_run, pairs):
    def run(stage, workdir, **fields):
        given = {"init": finished_run, "data__train": pairs, "data__seq_len": 48, **fields}
        return command(stage, workdir, **given)

    return run


def parameters(run):
    params = load_model(run, make_mesh(MeshConfig())).params
    return {path: np.asarray(leaf) for path, leaf in trees.leaves_with_paths(params)}


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def test_a_reward_model_learns_and_scores(prefer, command, curve, pairs, json_lines, tmp_path):
    run = tmp_path / "run"
    result = prefer("reward", run, steps=8, eval__every=4, checkpoint__every=4)
    assert result.code == 0, result.err
    losses = curve(run, "train/loss")
    # Drawn at random, rewards begin near 0.
    assert losses[1] == pytest.approx(np.log(2), abs=0.2)
    assert losses[8] < losses[1]
    summary = summary_of(run)
    assert {"preference/even/accuracy", "preference/odd/accuracy"} <= set(summary)
    assert summary["eval/accuracy"] == pytest.approx(curve(run, "eval/accuracy")[8], abs=1e-6)
    rewards = json.loads((run / "rewards.json").read_text())
    assert rewards["references"] > 50
    page = (run / "report.html").read_text()
    assert "calibration" in page.lower()
    assert re.search(r"[+-]\d\.\d\d ", (run / "samples.md").read_text())

    # Scored again, the answers that were preferred in training have the mean 0.
    scored = tmp_path / "scored"
    assert command("score", scored, init=run, texts=pairs).code == 0
    lines = [json.loads(line) for line in (scored / "scores.jsonl").read_text().splitlines()]
    assert (
        abs(np.mean([line["rewards"][0] for line in lines]))
        < 0.2 * np.std([reward for line in lines for reward in line["rewards"]]) + 0.05
    )
    one = json_lines([{"prompt": "a 1", "response": "aaa"}], "one")
    assert command("score", tmp_path / "one", init=run, texts=one).code == 0
    assert isinstance(json.loads((tmp_path / "one" / "scores.jsonl").read_text())["reward"], float)
    # It stays a language model, and its head is left out of that.
    assert command("generate", init=run, prompt="a").code == 0


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_resumed_run_is_the_uninterrupted_one(stage, prefer, curve, tmp_path):
    fields = {"optimizer__schedule": "constant"}
    assert prefer(stage, tmp_path / "whole", **fields).code == 0
    assert prefer(stage, tmp_path / "halves", steps=3, **fields).code == 0
    assert prefer(stage, tmp_path / "halves", steps=6, **fields).code == 0
    for name in ("train/loss", "eval/accuracy"):
        assert curve(tmp_path / "halves", name) == curve(tmp_path / "whole", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fields"),
    [("reward", {}), ("dpo", {}), ("dpo", {"dpo__loss": "kto"})],
    ids=["reward", "dpo", "kto"],
)
def test_a_mesh_changes_no_curve(stage, fields, prefer, curve, tmp_path):
    """Of eight devices: as many shares of the batch, or parameters and matrices cut too."""
    meshes = {"data": {}, "cut": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}}
    for name, mesh in meshes.items():
        result = prefer(stage, tmp_path / name, **fields, **mesh)
        assert result.code == 0, result.err
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/accuracy"):
        one, other = (curve(tmp_path / each, name) for each in meshes)
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_reference_is_the_same_computed_before_or_in_each_step(
    rank, prefer, finished_run, curve, tmp_path
):
    fields = {"lora__rank": rank, "dpo__beta": 0.5}
    stored = prefer("dpo", tmp_path / "stored", **fields)
    assert stored.code == 0, stored.err
    live = prefer("dpo", tmp_path / "live", dpo__live_reference=True, **fields)
    assert live.code == 0, live.err
    for name in ("train/loss", "train/accuracy", "eval/log_ratio"):
        one, other = (curve(tmp_path / way, name) for way in ("stored", "live"))
        np.testing.assert_allclose(list(one.values()), list(other.values()), atol=2e-5)
    losses = curve(tmp_path / "stored", "train/loss")
    assert losses[1] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are the same
    assert losses[6] < losses[1]
    assert curve(tmp_path / "stored", "eval/margin")[6] > 0
    # The reference is in no checkpoint, nor in what is trained.
    assert set(parameters(tmp_path / "live")) == set(parameters(finished_run))
    saved = (tmp_path / "live" / "checkpoints").rglob("*reference*")
    assert not list(saved)


def test_a_reference_is_rounded_as_the_base_is(prefer, curve, tmp_path):
    fields = {"lora__rank": 2, "lora__base": "int8", "steps": 1}
    assert prefer("dpo", tmp_path / "run", **fields).code == 0
    assert curve(tmp_path / "run", "train/loss")[1] == pytest.approx(np.log(2), abs=1e-6)
    assert curve(tmp_path / "run", "train/log_ratio")[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("live", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_with_the_reference_that_it_began_with(
    live, prefer, command, finished_run, curve, tmp_path
):
    base = shutil.copytree(finished_run, tmp_path / "base")
    fields = {"init": base, "dpo__live_reference": live, "optimizer__schedule": "constant"}
    assert prefer("dpo", tmp_path / "whole", **fields).code == 0
    assert prefer("dpo", tmp_path / "run", steps=3, **fields).code == 0
    config = json.loads((base / "config.json").read_text())["config"]
    more = command("pretrain", base, steps=16, data__train=config["data"]["train"])
    assert more.code == 0, more.err
    result = prefer("dpo", tmp_path / "run", **fields)
    if live:
        assert result.code == 2
        assert f"is not the reference that {tmp_path / 'run'} began with" in result.err
        return
    # What is computed is there, and nobody asks for the model.
    assert result.code == 0, result.err
    for name in ("train/loss", "eval/log_ratio"):
        assert curve(tmp_path / "run", name) == curve(tmp_path / "whole", name)


@pytest.mark.slow
def test_a_reward_model_is_trained_further_with_its_head(prefer, curve, tmp_path):
    assert prefer("reward", tmp_path / "first").code == 0
    losses = {}
    for rank in (0, 2):
        run = tmp_path / str(rank)
        assert prefer("reward", run, init=tmp_path / "first", lora__rank=rank, steps=1).code == 0
        losses[rank] = curve(run, "train/loss")[1]
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)  # B is 0
    assert losses[0] < curve(tmp_path / "first", "train/loss")[1]


@pytest.mark.parametrize("loss", ["ipo", "hinge", "simpo", "orpo"])
def test_every_loss_trains(loss, prefer, curve, tmp_path):
    result = prefer("dpo", tmp_path / "run", dpo__loss=loss, dpo__beta=2.0, steps=2)
    assert result.code == 0, result.err
    assert np.isfinite(list(curve(tmp_path / "run", "train/loss").values())).all()
    assert ("eval/log_ratio" in summary_of(tmp_path / "run")) == (loss in ("ipo", "hinge"))


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_single_responses_are_learnt_from(rank, prefer, curve, pairs, json_lines, tmp_path):
    fields = {
        "dpo__loss": "kto",
        "lora__rank": rank,
        "dpo__beta": 0.5,
        "optimizer__schedule": "constant",
    }
    result = prefer("dpo", tmp_path / "whole", **fields)
    assert result.code == 0, result.err
    losses = curve(tmp_path / "whole", "train/loss")
    assert losses[1] == pytest.approx(0.5, abs=1e-5)  # policy and reference are the same
    assert losses[6] < losses[1]
    assert curve(tmp_path / "whole", "eval/margin")[6] > 0
    points = curve(tmp_path / "whole", "train/reference_point")
    assert points[1] == pytest.approx(0, abs=1e-4)
    assert min(points.values()) >= 0
    # A pair is a good response and a bad one; single ones with a label are the same.
    single = [
        {"prompt": each["prompt"], "response": each[name], "label": name == "chosen"}
        for each in map(json.loads, pairs.read_text().splitlines())
        for name in ("chosen", "rejected")
    ]
    labelled = json_lines(single, "single")
    assert prefer("dpo", tmp_path / "single", data__train=labelled, **fields).code == 0
    assert curve(tmp_path / "single", "train/loss") == losses
    assert prefer("dpo", tmp_path / "halves", steps=3, **fields).code == 0
    assert prefer("dpo", tmp_path / "halves", steps=6, **fields).code == 0
    assert curve(tmp_path / "halves", "train/loss") == losses


@pytest.mark.slow
def test_single_responses_in_micro_batches(prefer, curve, tmp_path):
    fields = {"dpo__loss": "kto", "batch_size": 16, "steps": 3, "optimizer__learning_rate": 0.1}
    for parts in (1, 2):
        run = tmp_path / str(parts)
        result = prefer("dpo", run, micro_batch_size=16 // parts, **fields)
        assert result.code == 0, result.err
    for name in ("train/loss", "train/reference_point", "eval/loss"):
        one, two = (list(curve(tmp_path / parts, name).values()) for parts in ("1", "2"))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_single_responses_of_one_kind_teach_nothing(prefer, json_lines, tmp_path):
    good = [{"prompt": f"Say {n}", "response": "a" * (n % 3 + 1), "label": 1} for n in range(40)]
    given = {"data__train": json_lines(good, "good"), "dpo__loss": "kto"}
    result = prefer("dpo", tmp_path / "run", **given)
    assert result.code == 2
    assert "there is no bad one" in result.err


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": ""}, "config.init: give the run directory"),
        ({"data__packing": "concat"}, "concat would cut rankings"),
        ({"data__seq_len": 4}, "8 is the least"),
        ({"data__document_mask": False}, "responses must not see each other"),
    ],
)
def test_what_cannot_be(stage, fields, message, prefer, tmp_path):
    result = prefer(stage, tmp_path / "run", **fields)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dpo__loss": "orpo", "dpo__live_reference": True}, "orpo has no reference"),
        ({"dpo__loss": "ipo", "dpo__label_smoothing": 0.1}, "only sigmoid"),
        ({"dpo__beta": 0.0}, "beta: must be positive"),
        ({"dpo__loss": "simpo"}, "too little for simpo"),
        (
            {"dpo__live_reference": True, "lora__rank": 2, "train__trainable": ".*norm/scale"},
            "train.trainable changes it",
        ),
        ({"dpo__desirable": 2.0}, "only kto"),
        ({"dpo__loss": "kto", "dpo__undesirable": -1.0}, "undesirable: must be positive"),
        ({"dpo__loss": "kto", "dpo__best_response": 0.1}, "kto does not read it"),
        ({"dpo__loss": "kto", "data__packing": "none"}, "take best_fit"),
        ({"dpo__loss": "kto", "data__cleaning__near_duplicates": 0.8}, "leave it at 0"),
        (
            {"dpo__loss": "kto", "lora__rank": 2, "train__trainable": ".*norm/scale"},
            "dpo.loss: kto's reference",
        ),
        ({"dpo__template": "nowhere.jinja"}, "config.dpo.template: nowhere.jinja"),
    ],
)
def test_what_cannot_be_of_dpo(fields, message, prefer, tmp_path):
    result = prefer("dpo", tmp_path / "run", **fields)
    assert result.code == 2
    assert message in result.err


def test_bad_records_are_set_aside_and_too_many_end_the_run(prefer, json_lines, tmp_path):
    same = json_lines([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3, "same")
    result = prefer("reward", tmp_path / "run", data__train=same)
    assert result.code == 2
    assert "rejected.jsonl" in result.err
    reasons = (tmp_path / "run" / "rejected.jsonl").read_text()
    assert "`chosen` and `rejected` are the same" in reasons


def test_long_prompts_are_cut_from_the_left_and_counted(prefer, json_lines, tmp_path):
    long = json_lines(
        [
            {"prompt": "word " * 40 + str(n), "chosen": "a", "rejected": "b" * (n % 5 + 1)}
            for n in range(40)
        ],
        "long",
    )
    assert prefer("reward", tmp_path / "run", data__train=long, steps=1).code == 0
    assert summary_of(tmp_path / "run")["data/truncated"] == 40
