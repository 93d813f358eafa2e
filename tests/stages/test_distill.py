"""Runs that distil: what a student learns of a teacher, what they keep, and what they refuse."""

import json
import shutil

import numpy as np
import pytest

from jaxllm.inference import stored_teacher
from jaxllm.inference.stored_teacher import StoredTeacher
from jaxllm.rollouts.imitation import PartlyWritten

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def conversations(json_lines):
    return json_lines({"prompt": f"Repeat {n}", "response": f"yes {n}"} for n in range(80))


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher(layers=1)


def summary(run):
    return json.loads((run / "summary.json").read_text())


def kept_of(run, step):
    """The paths of the parameters that a checkpoint holds."""
    found = json.loads((run / "checkpoints" / str(step) / "params" / "_METADATA").read_text())
    return {
        "/".join(part["key"] for part in each["key_metadata"])
        for each in found["tree_metadata"].values()
    }


def test_a_student_comes_nearer_to_its_teacher(
    distil, command, teacher, curve, tmp_path, params_of
):
    run = tmp_path / "run"
    result = distil(run, steps=48)
    assert result.code == 0, result.err
    apart = curve(run, "eval/divergence")
    assert apart[48] < 0.7 * apart[4]
    found, of_teacher = summary(run), summary(teacher)
    assert found["eval/teacher_loss"] == pytest.approx(of_teacher["eval/loss"], rel=1e-5)
    assert 0 < found["eval/agreement"] < 1
    assert found["eval/bits_per_byte"] > of_teacher["eval/bits_per_byte"]
    assert found["model/parameters"] < of_teacher["model/parameters"]
    # The student alone is kept, and is a model as any other.
    kept = {path.split("/")[0] for path in params_of(run)}
    assert kept == {"embedding", "stack_0", "final_norm"}
    assert {path.split("/")[0] for path in kept_of(run, 48)} == kept
    assert json.loads((run / "teacher.json").read_text())["path"] == str(teacher.resolve())
    assert (run / "samples.md").exists()
    written = command("generate", init=run, prompt="a")
    assert written.code == 0, written.err


def test_a_student_that_is_its_teacher_stays_so(distil, teacher, tmp_path):
    run = tmp_path / "run"
    result = distil(run, init=teacher, model__width=16, steps=1, eval__every=1)
    assert result.code == 0, result.err
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["train/divergence"] == pytest.approx(0, abs=1e-5)
    assert logged["train/agreement"] == 1
    assert logged["train/loss"] == pytest.approx(logged["train/teacher_loss"], rel=1e-5)


def test_of_hard_labels_alone_it_is_pretraining(
    distil, command, teacher, curve, tmp_path, params_of
):
    fields = {"init": teacher, "model__width": 16, "steps": 4}
    assert distil(tmp_path / "one", distill__alpha=1.0, **fields).code == 0
    same = {**fields, "optimizer__learning_rate": 1e-2}
    assert command("pretrain", tmp_path / "other", **same).code == 0
    found, expected = (params_of(tmp_path / name) for name in ("one", "other"))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-5)
    ours, theirs = (curve(tmp_path / name, "train/loss") for name in ("one", "other"))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param(
            {"teacher__dtype": "int8", "micro_batch_size": 8, "batch_size": 16}, marks=SLOW
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(fields, distil, curve, tmp_path, params_of):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert distil(whole, optimizer__schedule="constant", **fields).code == 0
    assert distil(halves, optimizer__schedule="constant", steps=5, **fields).code == 0
    result = distil(halves, optimizer__schedule="constant", **fields)
    assert result.code == 0, result.err
    assert "going on from step 5 of 12" in result.err
    assert curve(halves, "train/loss") == curve(whole, "train/loss")
    expected = params_of(whole)
    for path, leaf in params_of(halves).items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("nf4", marks=SLOW)])
def test_a_teacher_in_fewer_bits(dtype, distil, teacher, tmp_path):
    run = tmp_path / "run"
    result = distil(run, teacher__dtype=dtype, steps=1)
    assert result.code == 0, result.err
    expected = summary(teacher)["eval/loss"]
    found = summary(run)["eval/teacher_loss"]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)


def test_the_answers_of_conversations(distil, conversations, curve, tmp_path):
    run = tmp_path / "run"
    fields = {"distill__records": "conversations", "data__train": conversations}
    result = distil(run, data__packing="best_fit", **fields)
    assert result.code == 0, result.err
    assert "eval/perplexity" in summary(run)
    assert curve(run, "eval/divergence")[12] < curve(run, "eval/divergence")[4]
    assert "Repeat" in (run / "samples.md").read_text()


@pytest.mark.slow
def test_a_mesh_changes_no_number(distil, curve, tmp_path):
    fields = {"model__heads": 2, "optimizer__eps": 1e-5, "eval__every": 12}
    assert distil(tmp_path / "one", mesh__data=8, **fields).code == 0
    cut = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    result = distil(tmp_path / "cut", **cut, **fields)
    assert result.code == 0, result.err
    for name in ("train/loss", "train/divergence", "train/grad_norm"):
        found, expected = (curve(tmp_path / run, name) for run in ("cut", "one"))
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)


def test_pairs_are_trained_beside_a_base_and_a_teacher(distil, teacher, curve, tmp_path):
    """Resumed, so that base and teacher are both found again; checkpoints hold the pairs alone."""
    base = shutil.copytree(teacher, tmp_path / "base")
    fields = {"init": base, "model__width": 16, "lora__rank": 2, "distill__alpha": 0.5}
    fields |= {"optimizer__schedule": "constant", "steps": 6}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert distil(whole, **fields).code == 0
    assert distil(run, **fields | {"steps": 3}).code == 0
    result = distil(run, **fields)
    assert result.code == 0, result.err
    assert curve(run, "train/loss") == curve(whole, "train/loss")
    kept = kept_of(run, 6)
    assert kept
    assert all("_lora_" in path for path in kept)


@pytest.mark.parametrize("kind", ["last", "padded", pytest.param("head", marks=SLOW)])
def test_a_teacher_however_it_was_trained(kind, distil, command, teacher, json_lines, tmp_path):
    """The last of several layers alone; with more rows than tokens; with a head that reads."""
    other = tmp_path / "other"
    if kind == "head":
        records = ({"text": f"{w} {n}", "label": w} for n in range(40) for w in "ac")
        fields = {"init": teacher, "data__train": json_lines(records), "steps": 1}
        assert command("classify", other, **fields).code == 0
    elif kind == "last":
        deep = tmp_path / "deep"
        assert command("pretrain", deep, model__layers=2, steps=1).code == 0
        fields = {"init": deep, "model__layers": 2, "train__trainable": "last:1", "steps": 1}
        assert command("pretrain", other, **fields).code == 0
    else:
        assert command("pretrain", other, model__vocab_size=320, steps=1).code == 0
    fields = {"teacher__init": other, "teacher__dtype": "bfloat16", "steps": 2}
    result = distil(tmp_path / "run", **fields)
    assert result.code == 0, result.err
    assert distil(tmp_path / "kept", **fields, teacher__top_k=5).code == 0


def test_a_finished_run_needs_its_teacher_no_more(distil, teacher, tmp_path):
    own = shutil.copytree(teacher, tmp_path / "teacher")
    assert distil(tmp_path / "run", teacher__init=own, steps=1).code == 0
    shutil.rmtree(own)
    result = distil(tmp_path / "run", teacher__init=own, steps=1)
    assert (result.code, "the run is finished" in result.out) == (0, True)
    assert distil(tmp_path / "run", teacher__init=own, steps=2).code == 2


def test_what_ends_a_text_may_be_another(distil, teacher, tmp_path):
    """As of a base model and what was tuned from it."""
    other = shutil.copytree(teacher, tmp_path / "other")
    path = other / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings["eos_token"] != settings["bos_token"]
    path.write_text(json.dumps(settings | {"eos_token": settings["bos_token"]}))
    fields = {"init": teacher, "model__width": 16, "steps": 1}
    result = distil(tmp_path / "run", teacher__init=other, **fields)
    assert result.code == 0, result.err


def test_a_teacher_that_has_moved_or_changed(distil, teacher, tmp_path):
    own = shutil.copytree(teacher, tmp_path / "before" / "teacher")
    run = tmp_path / "before" / "run"
    assert distil(run, teacher__init=own, steps=2).code == 0
    (tmp_path / "before").rename(tmp_path / "after")  # together
    run = tmp_path / "after" / "run"
    assert distil(run, teacher__init=own, steps=3).code == 0
    (tmp_path / "after" / "teacher").rename(tmp_path / "elsewhere")
    result = distil(run, teacher__init=own, steps=4)
    assert result.code == 2
    assert "learns of a teacher, which is not at" in result.err
    shutil.copytree(run, tmp_path / "after" / "teacher")  # another model of the same tokenizer
    result = distil(run, teacher__init=own, steps=4)
    assert result.code == 2
    assert "is not the teacher that" in result.err


@pytest.fixture
def refused(distil, tmp_path):
    """The one line in which a run is refused; nothing is made."""

    def run(**fields):
        result = distil(tmp_path / "refused", **fields)
        assert result.code == 2, result.err
        assert not (tmp_path / "refused" / "checkpoints").exists()
        return result.err.splitlines()[-1]

    return run


def test_another_vocabulary_is_refused(command, refused, teacher, tmp_path):
    other = tmp_path / "other"
    assert command("pretrain", other, tokenizer__vocab_size=310, steps=1).code == 0
    line = refused(init=teacher, model__width=16, teacher__init=other)
    assert f"config.teacher.init: {other} has another vocabulary: the student's has 300" in line
    assert "and the teacher's 310; the first to differ is" in line


def test_a_teacher_of_an_unknown_family_is_refused(refused, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    (folder / "tokenizer.json").write_text("{}")
    assert "unheard_of" in refused(teacher__init=folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher__init": ""}, "config.teacher.init: give the run directory"),
        ({"teacher__init": "nowhere"}, "nowhere: "),
        ({"teacher__dtype": "int3"}, "config.teacher.dtype: must be one of"),
        ({"distill__divergence": "l2"}, "config.distill.divergence: must be one of"),
        ({"distill__records": "images"}, "config.distill.records: must be one of"),
        (
            {"distill__records": "conversations"},
            "config.data.packing: concat would cut conversations",
        ),
        ({"sft__max_prompt": 4}, "config.sft: is read of conversations alone"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(fields, message, refused):
    assert message in refused(**fields)


def test_a_teacher_that_sees_both_ways_is_refused(refused, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    recorded = json.loads((other / "config.json").read_text())
    recorded["config"]["model"]["causal"] = False
    (other / "config.json").write_text(json.dumps(recorded))
    assert "config.teacher.init: its model sees both ways" in refused(teacher__init=other)


ON_POLICY = {"temperature": 1.0, "distill__max_prompt": 6, "max_new_tokens": 10}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_student_learns_on_what_it_writes(share, distil, teacher, curve, tmp_path, monkeypatch):
    """From text, and as well for the held-out text, which it has not written."""
    run, watched = tmp_path / "run", set()
    rollout = PartlyWritten.rollout

    def watching(self, *arguments):
        asked, written = rollout(self, *arguments)
        watched.add(sum(any(response.log_probs) for response in written))
        return asked, written

    monkeypatch.setattr(PartlyWritten, "rollout", watching)
    fields = {"steps": 24, "eval__every": 8, **ON_POLICY}
    result = distil(run, distill__on_policy_fraction=share, **fields)
    assert result.code == 0, result.err
    apart = curve(run, "eval/divergence")
    assert apart[24] < 0.9 * apart[8]
    assert 0 < min(curve(run, "rollout/length").values()) <= 10
    assert watched == {round(share * 8)}
    assert not curve(run, "rollout/reward")
    assert summary(run)["eval/teacher_loss"] == pytest.approx(
        summary(teacher)["eval/loss"], rel=1e-5
    )


def test_a_run_on_its_own_texts_is_resumed(distil, curve, tmp_path, params_of):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fields = {"distill__on_policy_fraction": 0.5, "optimizer__schedule": "constant", **ON_POLICY}
    assert distil(whole, steps=6, **fields).code == 0
    assert distil(halves, steps=3, **fields).code == 0
    result = distil(halves, steps=6, **fields)
    assert result.code == 0, result.err
    assert curve(halves, "train/loss") == curve(whole, "train/loss")
    expected = params_of(whole)
    for path, leaf in params_of(halves).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_a_student_answers_itself(distil, conversations, curve, tmp_path, monkeypatch):
    """From where an answer begins, whose given ones are those of the records."""
    seen = []
    rollout = PartlyWritten.rollout

    def watched(self, *arguments):
        asked, written = rollout(self, *arguments)
        decode = self.writer.tokenizer.decode
        seen.extend(
            (decode(prompt.ids), prompt.ids[-1] == self.writer.tokenizer.bos_id, response)
            for prompt, response in zip(asked, written, strict=True)
        )
        return asked, written

    monkeypatch.setattr(PartlyWritten, "rollout", watched)
    fields = {"distill__records": "conversations", "data__train": conversations} | ON_POLICY
    fields |= {"data__packing": "best_fit", "distill__max_prompt": 20, "steps": 2}
    result = distil(tmp_path / "run", distill__on_policy_fraction=0.5, **fields)
    assert result.code == 0, result.err
    given = [each for each in seen if not any(each[2].log_probs)]
    assert len(given) == len(seen) / 2
    for prompt, is_open, response in seen:
        assert prompt.startswith("Repeat ")
        assert is_open
        if (prompt, is_open, response) in given:
            assert response.text == prompt.replace("Repeat", "yes")
            assert response.ended


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "config.temperature: must be positive"),
        ({"top_k": 3}, "config.top_k: the student learns on what it would write without it"),
        ({"distill__on_policy_fraction": 1.5}, "config.distill.on_policy_fraction: must be from"),
        ({"distill__on_policy_fraction": 0.01}, "of 8 sequences that is none"),
        ({"distill__on_policy_fraction": 0.0}, "config.distill.max_prompt: nothing reads it"),
        ({"steps": 10**6, "data__max_epochs": 1}, "the limits of epochs allow"),
        ({"distill__max_prompt": 1000}, "has nothing to go on from"),
        (
            {"model__max_positions": 32, "max_new_tokens": 27},
            "config.distill.max_prompt and config.max_new_tokens: 33 tokens are more than the 32",
        ),
    ],
)
def test_what_is_wrong_with_its_own_texts_is_told(fields, message, refused):
    fields = {"distill__on_policy_fraction": 0.5} | ON_POLICY | fields
    assert message in refused(**fields)


@pytest.mark.parametrize("fields", [{}, pytest.param({"distill__temperature": 2.0}, marks=SLOW)])
def test_all_that_a_teacher_says_is_as_good_kept_as_asked(fields, distil, curve, tmp_path):
    live, kept = tmp_path / "live", tmp_path / "kept"
    fields = {"steps": 6, "eval__every": 6, **fields}
    assert distil(live, **fields).code == 0
    result = distil(kept, teacher__top_k=1000, **fields)
    assert result.code == 0, result.err
    for name in ("train/loss", "train/divergence", "eval/divergence", "eval/agreement"):
        found, expected = (list(curve(run, name).values()) for run in (kept, live))
        np.testing.assert_allclose(found, expected, rtol=3e-3, atol=1e-4)
    assert "eval/teacher_loss" not in summary(kept)


def test_a_teacher_is_asked_once(distil, conversations, curve, tmp_path, monkeypatch):
    """Of the likeliest tokens alone; another run finds what it said, one of other rows does not."""
    asked = []
    said = StoredTeacher._said

    def watched(self, params, block, *rest):
        asked.append(len(block))
        return said(self, params, block, *rest)

    monkeypatch.setattr(StoredTeacher, "_said", watched)
    monkeypatch.setattr(stored_teacher, "ROWS_OF_FILE", 16)
    store = tmp_path / "store"
    fields = {"teacher__top_k": 8, "data__store": store, "distill__records": "conversations"}
    fields |= {"data__train": conversations, "data__packing": "best_fit", "steps": 8}
    result = distil(tmp_path / "one", **fields)
    assert result.code == 0, result.err
    (folder, *_) = sorted(store.rglob("teacher_*"))
    sizes = {path.name: np.load(path).shape for path in folder.iterdir()}
    assert {name.split("_0")[0] for name in sizes} == {"ids", "log_probs"}
    assert {shape[1:] for shape in sizes.values()} == {(32, 8)}
    bytes_of = sum(np.load(path).dtype.itemsize for path in sorted(folder.glob("*_00000.npy")))
    assert bytes_of == 4
    times = len(asked)
    assert times >= 2
    assert (
        curve(tmp_path / "one", "eval/divergence")[8]
        < curve(tmp_path / "one", "eval/divergence")[4]
    )
    assert distil(tmp_path / "other", **fields, seed=1).code == 0
    assert len(asked) == times
    (folder / "ids_00000.npy").write_bytes(b"broken")
    assert distil(tmp_path / "third", **fields, seed=2).code == 0
    assert len(asked) == times + 1
    assert distil(tmp_path / "fourth", **fields | {"data__packing": "none"}).code == 0
    assert len(asked) > times + 2


def test_what_is_kept_of_a_teacher_is_no_help_on_what_is_written_later(refused):
    fields = {"distill__on_policy_fraction": 0.5, "teacher__top_k": 8} | ON_POLICY
    assert "config.teacher.top_k: what the student writes is not known" in refused(**fields)
