"""Classification through the command: what a user sees, what is trained, and what is refused."""

import json

import numpy as np
import pytest

from jaxllm import api, trees
from jaxllm.checkpoints.load import load_model
from jaxllm.data.labels import Labels
from jaxllm.main import main
from jaxllm.reporting.samples import read_samples
from jaxllm.sharding.mesh import MeshConfig, make_mesh

WORDS = {"red": "abc", "green": "def", "blue": "ghi"}


def records(count=90):
    """Each class has letters of its own."""
    return [
        {"text": f"{letters} {n} {letters[::-1]}", "label": label}
        for n in range(count // 3)
        for label, letters in WORDS.items()
    ]


@pytest.fixture(scope="module")
def colours(json_lines):
    return json_lines(records(), "colours")


@pytest.fixture
def classify(command, finished_run, colours):
    def run(workdir, **fields):
        given = {"init": finished_run, "data__train": colours, **fields}
        return command("classify", workdir, **given)

    return run


def parameters(run):
    params = load_model(run, make_mesh(MeshConfig())).params
    return {path: np.asarray(leaf) for path, leaf in trees.leaves_with_paths(params)}


def test_a_run_learns_to_classify_and_tells_it(classify, command, curve, tmp_path):
    run = tmp_path / "run"
    result = classify(run, steps=30, eval__every=15, checkpoint__every=15)
    assert result.code == 0, result.err
    assert "labels of 7" in result.err
    assert curve(run, "eval/accuracy")[30] == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval/accuracy"] == summary["eval/macro_f1"] == 1
    assert summary["eval/majority"] < 0.6
    assert summary["eval/loss"] == pytest.approx(curve(run)[30])
    assert Labels.load(run / "labels.json").names == ("blue", "green", "red")
    told = json.loads((run / "classes.json").read_text())
    assert [each["name"] for each in told["classes"]] == ["blue", "green", "red"]
    assert np.trace(told["confusion"]) == summary["data/eval_documents"]
    page = (run / "report.html").read_text()
    assert "What is taken for what" in page
    assert "macro F1" in page
    samples = read_samples(run / "samples.md")
    assert {sample.step for sample in samples} == {15, 30}
    assert "; is " in samples[0].text
    assert classify(run, steps=30).out.endswith("raise config.steps to train on.\n")
    # What is trained on stays a language model, and its head is left out of it.
    assert command("generate", init=run, prompt="a").code == 0
    more = command("pretrain", tmp_path / "more", init=run, steps=1)
    assert more.code == 0, more.err
    assert not any(path.startswith("head") for path in parameters(tmp_path / "more"))


def test_a_resumed_run_is_the_uninterrupted_one(classify, curve, tmp_path):
    fields = {"optimizer__schedule": "constant", "train__trainable": "last:1"}
    assert classify(tmp_path / "whole", **fields).code == 0
    assert classify(tmp_path / "halves", steps=3, **fields).code == 0
    assert classify(tmp_path / "halves", steps=6, **fields).code == 0
    for name in ("train/loss", "eval/accuracy"):
        assert curve(tmp_path / "halves", name) == curve(tmp_path / "whole", name)


@pytest.fixture(scope="module")
def two_layers(arguments, compiled, tmp_path_factory):
    """A run of an untied model of two layers."""
    run = tmp_path_factory.mktemp("two") / "run"
    fields = {"model.layers": 2, "model.tied": False, "steps": 2}
    assert main(arguments("pretrain", run, fields)) == 0
    return run


TRAINED = {
    "head": ({"train__trainable": "head"}, {"head/kernel", "head/bias"}),
    "last:1": (
        {"train__trainable": "last:1"},
        {"head/kernel", "head/bias", "final_norm/scale", "stack_1/*"},
    ),
    ".*": ({}, {"head/kernel", "head/bias", "final_norm/scale", "stack_0/*", "embedding"}),
    "lora": (
        {"lora__rank": 2, "lora__pattern": ".*/attention/query/kernel"},
        {"head/kernel", "head/bias", "stack_0/layer_0/attention/query/kernel"},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_asked_for_is_trained_and_nothing_else(
    name, command, colours, two_layers, tmp_path
):
    fields, expected = TRAINED[name]
    result = command("classify", tmp_path / "run", init=two_layers, data__train=colours, **fields)
    assert result.code == 0, result.err
    before, after = parameters(two_layers), parameters(tmp_path / "run")
    if name == "last:1":
        first = {p: leaf[:1] for p, leaf in before.items() if p.startswith("stack_0")}
        last = {p.replace("stack_0", "stack_1"): leaf[1:] for p, leaf in before.items()
                if p.startswith("stack_0")}  # fmt: skip
        before = before | first | last
    changed = {
        path if not path.startswith("stack") or path in expected else f"{path.split('/')[0]}/*"
        for path, leaf in after.items()
        if path not in before or not np.array_equal(leaf, before[path])
    }
    assert changed == expected
    np.testing.assert_array_equal(after["output"], before["output"])


@pytest.mark.parametrize(
    ("kind", "label", "score"),
    [
        ("multi_label", lambda n: [name for name, k in (("two", 2), ("three", 3)) if n % k == 0],
         "eval/micro_f1"),
        ("regression", lambda n: n / 10, "eval/root_mean_squared_error"),
    ],
)  # fmt: skip
def test_sets_and_values_are_learnt_too(
    kind, label, score, command, finished_run, json_lines, tmp_path
):
    data = json_lines([{"text": f"{n} {n % 6}", "label": label(n)} for n in range(60)])
    run = tmp_path / "run"
    fields = {"classify__kind": kind, "model__head__pooling": "mean"}
    result = command("classify", run, init=finished_run, data__train=data, **fields)
    assert result.code == 0, result.err
    summary = json.loads((run / "summary.json").read_text())
    assert score in summary
    assert summary["eval/loss"] > 0


def test_ways_of_classifying_stand_in_one_table(classify, tmp_path):
    run = tmp_path / "run"
    result = classify(run, steps=2, classify__prompting="0,1", classify__prompting_texts=6)
    assert result.code == 0, result.err
    summary = json.loads((run / "summary.json").read_text())
    ways = {name.split("/")[1] for name in summary if name.startswith("classify/")}
    asked = {
        f"{way}, {n}" for way in ("likelihood", "written") for n in ("0 examples", "1 example")
    }
    assert ways == {"trained head"} | asked
    assert summary["classify/trained head/texts"] == 6
    assert "Ways of classifying" in result.out


def test_labels_that_change_are_told_in_a_run_that_has_begun(
    command, finished_run, json_lines, tmp_path
):
    data = json_lines(records(), "mine")
    fields = {"init": finished_run, "data__train": data}
    assert command("classify", tmp_path / "run", steps=2, **fields).code == 0
    lines = data.read_text().replace('"red"', '"scarlet"')
    data.write_text(lines)
    result = command("classify", tmp_path / "run", steps=4, **fields)
    assert (result.code, "the text is not the one" in result.err) == (2, True)


def one_class():
    return [{"text": f"{n}", "label": "only"} for n in range(30)]


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (one_class, {}, "training texts have the label 'only'; there is nothing to tell apart"),
        (records, {"init": ""}, "config.init: give the run directory"),
        (records, {"data__packing": "concat"}, "concat would cut texts"),
        (records, {"data__seq_len": 2}, "data.seq_len: 3 is the least"),
        (records, {"classify__label": "colour"}, "no field `colour`"),
        (records, {"classify__kind": "regression"}, "is no number"),
        (records, {"classify__class_weights": "pink:2"}, "'pink' is no class"),
        (records, {"train__trainable": "last:7"}, "the model has 1 layers, and the last 7"),
        (records, {"train__trainable": "last:0"}, "last:N is the last N layers"),
        (records, {"train__trainable": "nothing"}, "config.train.trainable"),
        (records, {"train__trainable": "head", "lora__rank": 2}, "does not train low-rank pairs"),
        (
            records,
            {"model__head__outputs": 3},
            "config.model.head.outputs: follows from the labels",
        ),
        (records, {"model__head__pooling": "max"}, "pooling: must be one of last, mean"),
        (records, {"classify__prompting": "99"}, "99 examples are asked for, and are chosen from"),
        (records, {"data__document_mask": False}, "texts must not see each other"),
        (records, {"classify__prompting": "many"}, "prompting: is a list of whole numbers"),
    ],
)
def test_mistakes_are_told_in_one_line(make, fields, message, classify, json_lines, tmp_path):
    result = classify(tmp_path / "run", **{"data__train": json_lines(make())} | fields)
    assert result.code == 2, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_label_that_is_only_held_out_is_told(command, finished_run, json_lines, tmp_path):
    train = json_lines(records(), "train")
    held_out = json_lines([{"text": "x", "label": "pink"}, {"text": "abc", "label": "red"}])
    fields = {"init": finished_run, "data__train": train, "data__eval": held_out}
    result = command("classify", tmp_path / "run", **fields)
    assert result.code == 2
    assert "labels that no training text has: 'pink' (1)" in result.err


def test_a_head_is_for_this_stage_alone(command, finished_run, tmp_path):
    result = command("pretrain", tmp_path / "run", init=finished_run, model__head__outputs=2)
    assert (result.code, "this stage trains no head" in result.err) == (2, True)


@pytest.fixture(scope="module")
def classifier(arguments, compiled, finished_run, colours, tmp_path_factory):
    """A run that tells colours by their letters."""
    run = tmp_path_factory.mktemp("classifier") / "run"
    fields = {"init": finished_run, "data.train": colours, "steps": 30, "eval.every": 30}
    assert main(arguments("classify", run, fields)) == 0
    return run


def test_a_classifier_is_measured_and_used(classifier, command, json_lines, tmp_path):
    summary = json.loads((classifier / "summary.json").read_text())
    evaluated = command("evaluate", tmp_path / "evaluated", init=classifier)
    assert evaluated.code == 0, evaluated.err
    again = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert again["eval/macro_f1"] == summary["eval/macro_f1"] == 1
    assert again["eval/texts"] == summary["data/eval_documents"]
    others = json_lines(
        [{"text": "abc 5 cba", "label": "red"}, {"text": "def 5 fed", "label": "red"}]
    )
    measured = command("evaluate", tmp_path / "measured", init=classifier, data__eval=others)
    assert measured.code == 0, measured.err
    found = json.loads((tmp_path / "measured" / "summary.json").read_text())
    assert found["eval/accuracy"] == 0.5

    told = command("score", init=classifier, text="ghi 3 ihg")
    assert told.code == 0, told.err
    assert json.loads(told.out)["label"] == "blue"
    scored = command("score", tmp_path / "scored", init=classifier, texts=others)
    assert scored.code == 0, scored.err
    lines = [json.loads(x) for x in (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["red", "green"]
    assert lines[0]["text"] == "abc 5 cba"
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    model = api.load(classifier)
    assert [each.label for each in model.classify(["abc 1 cba", "def 2 fed"])] == ["red", "green"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "config.text: give a text, or config.texts"),
        ({"text": "a", "init": ""}, "config.init: give the run directory"),
        ({"text": "a", "init": "/nowhere"}, "/nowhere"),
        ({"texts": "builtin:pydocs_classify:3"}, "--workdir is missing"),
        ({"text": "a", "texts": "b"}, "and not both"),
    ],
)
def test_mistakes_of_scoring_are_told_in_one_line(fields, message, classifier, command):
    result = command("score", **{"init": classifier, **fields})
    assert (result.code, "Traceback" in result.err) == (2, False)
    assert message in result.err


def test_a_record_without_text_is_told(classifier, command, json_lines, tmp_path):
    source = json_lines([{"text": "a"}, {"words": "b"}])
    result = command("score", tmp_path / "scored", init=classifier, texts=source)
    assert result.code == 2
    assert "line 2: no field `text` (it has words)" in result.err
    assert not (tmp_path / "scored").exists()


def test_what_is_no_classifier_does_not_score(command, finished_run):
    result = command("score", init=finished_run, text="a")
    assert result.code == 2
    assert "is no run of the stage classify" in result.err


def adapter_of(command, init, run, stage, data):
    result = command(stage, run, init=init, data__train=data, lora__rank=2, steps=3)
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="module")
def instructions(json_lines):
    return json_lines({"prompt": f"Repeat {n}", "response": f"yes {n}"} for n in range(60))


@pytest.mark.slow
def test_adapters_of_cut_models_and_of_classifiers_are_used(
    command, two_layers, classifier, instructions, colours, json_lines, tmp_path
):
    last = tmp_path / "last"
    fields = {"train__trainable": "last:1", "model__layers": 2, "model__tied": False}
    assert command("pretrain", last, init=two_layers, steps=1, **fields).code == 0
    for name, base in (("of last", last), ("of classifier", classifier)):
        run = adapter_of(command, base, tmp_path / name, "sft", instructions)
        alone = command("generate", init=run, prompt="a", temperature=0.0)
        assert alone.code == 0, alone.err
        together = command(
            "generate", init=base, adapters=f"x={run}", adapter="x", prompt="a", temperature=0.0
        )
        assert together.out == alone.out, together.err
    animals = json_lines(
        {"text": f"{word} {n}", "label": word} for n in range(20) for word in ("cat", "dog")
    )
    two = adapter_of(command, classifier, tmp_path / "two", "classify", animals)
    again = adapter_of(command, two, tmp_path / "again", "classify", colours)
    for run in (two, again):
        told = command("score", init=run, text="abc")
        assert told.code == 0, told.err


def test_a_cut_model_and_a_classifier_go_out_as_language_models(command, classifier, tmp_path):
    for name in ("one", "two"):
        result = command("export_hf", tmp_path / name, init=classifier)
        assert result.code == 0, result.err
        classifier = tmp_path / name
    assert command("generate", init=classifier, prompt="a").code == 0


def test_a_classifier_of_the_same_classes_is_trained_further(
    command, classifier, colours, json_lines, curve, tmp_path
):
    fields = {"init": classifier, "steps": 1, "eval__every": 1, "optimizer__learning_rate": 1e-9}
    assert command("classify", tmp_path / "more", data__train=colours, **fields).code == 0
    assert curve(tmp_path / "more", "eval/accuracy")[1] == 1
    renamed = json_lines([each | {"label": each["label"].title()} for each in records()], "renamed")
    assert command("classify", tmp_path / "new", data__train=renamed, **fields).code == 0
    assert curve(tmp_path / "new")[1] == pytest.approx(np.log(3), abs=0.01)


def test_what_is_used_is_read_as_what_was_trained(command, classifier):
    """Cleaned, and cut where the run's rows end."""
    model = api.load(classifier)
    one, other = model.classify(["abc 1 cba", "abc\u00a01\u200b cba"])
    assert one == other
    assert model.classifier.context == 32
