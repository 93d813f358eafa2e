"""Runs that train low-rank pairs: what they keep, and what they need of their base."""

import json
import shutil

import pytest

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def instructions(json_lines):
    return json_lines({"prompt": f"Repeat {n}", "response": f"yes {n}"} for n in range(80))


@pytest.fixture
def base(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "base")


@pytest.fixture
def adapt(command, instructions):
    def run(workdir, init, stage="sft", **fields):
        own = {"data__train": instructions} if stage == "sft" else {"steps": 6}
        return command(stage, workdir, **{**own, "init": init, "lora__rank": 2, **fields})

    return run


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_adapter_is_kept_alone_and_used_with_its_base(adapt, command, base, curve, tmp_path):
    run = tmp_path / "run"
    result = adapt(run, base, steps=12)
    assert result.code == 0, result.err
    assert "attention/query/kernel" in result.err
    assert "all of the model" in result.err
    found = curve(run)
    assert found[12] < found[3]
    summary = json.loads((run / "summary.json").read_text())
    of_base = json.loads((base / "summary.json").read_text())
    assert summary["model/trained_parameters"] < 0.5 * of_base["model/parameters"]
    # Two moments of float32, and two counters.
    assert summary["model/optimizer_bytes"] == 8 * summary["model/trained_parameters"] + 4
    newest = max((base / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert size(run / "checkpoints" / "12" / "params") < 0.7 * size(newest / "params")

    evaluated = command("evaluate", tmp_path / "evaluated", init=run)
    assert evaluated.code == 0, evaluated.err
    again = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert again["eval/loss"] == pytest.approx(found[12], abs=1e-5)
    exported = command("export_hf", tmp_path / "exported", init=run)
    assert exported.code == 0, exported.err

    # An adapter may be the base of another, and of a run that trains everything.
    assert adapt(tmp_path / "second", run, steps=1).code == 0
    assert command("generate", init=tmp_path / "second", prompt="a").code == 0
    assert adapt(tmp_path / "whole", run, steps=1, lora__rank=0).code == 0
    assert not (tmp_path / "whole" / "base.json").exists()


def test_a_resumed_run_is_the_uninterrupted_one(adapt, base, curve, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fields = {"optimizer__schedule": "constant", "lora__dropout": 0.2}
    assert adapt(whole, base, **fields).code == 0
    assert adapt(halves, base, steps=3, **fields).code == 0
    assert adapt(halves, base, **fields).code == 0
    assert curve(halves, "train/loss") == curve(whole, "train/loss")
    assert curve(halves) == curve(whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora__dora": True, "lora__pattern": ".*query/kernel|embedding"},
        pytest.param({"lora__rslora": True, "train__ema": 0.9}, marks=SLOW),
        pytest.param({"train__trainable": r".*_lora_(a|b)|.*norm/scale"}, marks=SLOW),
    ],
)
def test_options_come_back_as_they_were_trained(fields, adapt, command, base, curve, tmp_path):
    run = tmp_path / "run"
    result = adapt(run, base, steps=3, **fields)
    assert result.code == 0, result.err
    evaluated = command("evaluate", tmp_path / "evaluated", init=run)
    assert evaluated.code == 0, evaluated.err
    again = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert again["eval/loss"] == pytest.approx(curve(run)[3], abs=1e-5)


@pytest.mark.parametrize(
    "how", [*(pytest.param(x, marks=SLOW) for x in ("bfloat16", "int8")), "nf4"]
)
def test_a_base_in_fewer_bits_is_the_same_when_it_is_used(
    how, adapt, command, curve, base, tmp_path
):
    run = tmp_path / "run"
    result = adapt(run, base, steps=3, lora__base=how, lora__dora=how == "nf4")
    assert result.code == 0, result.err
    assert adapt(run, base, steps=6, lora__base=how, lora__dora=how == "nf4").code == 0
    evaluated = command("evaluate", tmp_path / "evaluated", init=run)
    assert evaluated.code == 0, evaluated.err
    again = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert again["eval/loss"] == pytest.approx(curve(run)[6], abs=1e-4)
    named = command("generate", init=base, adapters=f"x={run}", adapter="x", prompt="a")
    assert (named.code, f"a base held as {how}" in named.err) == (2, True)


def test_what_is_trained_is_not_held_in_fewer_bits(adapt, base, tmp_path):
    result = adapt(tmp_path / "run", base, lora__base="int8", train__trainable="stack_0/.*")
    assert result.code == 2
    assert "config.lora.base: stack_0/layer_0/" in result.err


def test_adapters_of_one_base_write_in_one_batch(adapt, command, base, json_lines, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        assert adapt(tmp_path / name, base, steps=12, seed=seed).code == 0
    asked = json_lines(
        [{"prompt": "a", "adapter": name} for name in ("one", "two")] + [{"prompt": "a"}]
    )
    fields = {"temperature": 0.0, "max_new_tokens": 8}
    named = f"one={tmp_path / 'one'},two={tmp_path / 'two'}"
    out = tmp_path / "out"
    result = command("generate", out, init=base, adapters=named, prompts=asked, **fields)
    assert result.code == 0, result.err
    lines = [json.loads(x) for x in (out / "generations.jsonl").read_text().splitlines()]
    assert [line.get("adapter") for line in lines] == ["one", "two", None]
    for line, run in zip(lines, (tmp_path / "one", tmp_path / "two", base), strict=True):
        alone = command("generate", init=run, prompt="a", **fields)
        assert alone.out == f"a{line['response']}\n"
    result = command("generate", init=base, adapters=named, adapter="three", prompt="a", **fields)
    assert result.code == 2
    assert "config.adapter: 'three' is no adapter; known are one, two" in result.err
    other = command("generate", init=tmp_path / "one", adapters=named, prompt="a", **fields)
    assert (other.code, "is not the base" in other.err) == (2, True)


def test_pretraining_goes_on_with_pairs(adapt, base, corpus, tmp_path):
    fields = {"data__train": corpus, "tokenizer__vocab_size": 300, "references": False}
    model = {"model__layers": 1, "model__width": 16, "model__heads": 2}
    assert adapt(tmp_path / "run", base, "pretrain", steps=1, **fields, **model).code == 0


def test_a_base_that_is_moved_with_its_adapter_is_found(adapt, command, base, tmp_path):
    assert adapt(tmp_path / "run", base, steps=1).code == 0
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "run"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert command("generate", init=tmp_path / "elsewhere" / "run", prompt="a").code == 0
    resumed = adapt(tmp_path / "elsewhere" / "run", base, steps=2)  # the same command
    assert resumed.code == 0, resumed.err
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    result = command("generate", init=tmp_path / "elsewhere" / "run", prompt="a")
    assert result.code == 2
    assert f"its base is not at {base} any more" in result.err


def test_a_run_killed_while_its_base_is_loaded_begins_again(adapt, base, curve, tmp_path):
    run = tmp_path / "run"
    assert adapt(run, base, steps=3).code == 0
    expected = curve(run, "train/loss")
    for name in ("base.json", "metrics.jsonl", "summary.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    assert adapt(run, base, steps=3).code == 0
    assert curve(run, "train/loss") == expected


def test_a_lost_or_foreign_record_of_the_base_is_told(adapt, base, tmp_path):
    run = tmp_path / "run"
    assert adapt(run, base, steps=3).code == 0
    recorded = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps(recorded | {"checksums": []}))
    result = adapt(run, base, steps=6)
    assert (result.code, "its checksums is a list" in result.err) == (2, True)
    (run / "base.json").unlink()
    result = adapt(run, base, steps=6)
    assert (result.code, "base.json: is gone" in result.err) == (2, True)
    (run / "base.json").write_text(json.dumps(recorded))
    assert adapt(run, base, steps=6).code == 0


def test_the_work_of_gradients_that_are_not_made_does_not_count(adapt, base, curve, tmp_path):
    per_token = {}
    for rank in (0, 2):
        run = tmp_path / f"{rank}"
        assert adapt(run, base, steps=2, lora__rank=rank, log__peak_tflops=1.0).code == 0
        speed, share = curve(run, "train/tokens_per_second"), curve(run, "train/mfu")
        per_token[rank] = share[2] * 1e12 / speed[2]
    assert per_token[2] == pytest.approx(2 / 3 * per_token[0], rel=0.1)


def test_an_adapter_for_another_base_is_told(adapt, command, arguments, base, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert adapt(run, base, steps=1).code == 0
    assert command("pretrain", other, init=base, steps=1).code == 0
    shutil.rmtree(base)
    shutil.move(other, base)
    for result in (command("evaluate", init=run), adapt(run, base, steps=2)):
        assert result.code == 2
        assert "is not the base that the adapter" in result.err
        assert "parameters differ, embedding among them" in result.err


def test_an_adapter_goes_out_in_the_format_of_peft_and_comes_back(adapt, command, base, tmp_path):
    run, folder, again = (tmp_path / name for name in ("run", "peft", "again"))
    fields = {"lora__rslora": True, "optimizer__learning_rate": 0.1}
    assert adapt(run, base, steps=12, **fields).code == 0
    exported = command("export_hf", folder, init=run, adapter=True)
    assert exported.code == 0, exported.err
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    imported = command("import_hf", again, init=folder, base=base)
    assert imported.code == 0, imported.err
    assert "an adapter of rank 2" in imported.out
    written = {"prompt": "a", "max_new_tokens": 24, "temperature": 0.0}
    texts = [command("generate", init=init, **written).out for init in (run, again, base)]
    assert texts[0] == texts[1] != texts[2]
    assert command("import_hf", again, init=folder, base=base).out.endswith("imported already.\n")


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("import_hf", {"base": ""}, "config.base: give the run directory"),
        ("import_hf", {"lora__rank": 3}, "config.lora: is told by the adapter's files"),
        ("import_hf", {"base": "/nowhere"}, "/nowhere: is no run directory"),
    ],
)
def test_mistakes_of_importing_an_adapter(stage, fields, message, command, base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    given = {"init": tmp_path / "adapter", "base": base, **fields}
    result = command(stage, tmp_path / "run", **given)
    assert result.code == 2
    assert message in result.err


def test_what_is_no_adapter_is_not_exported_as_one(adapt, command, base, tmp_path):
    result = command("export_hf", tmp_path / "out", init=base, adapter=True)
    assert (result.code, "is no adapter" in result.err) == (2, True)
    fields = {"train__trainable": r".*_lora_(a|b)|.*norm/scale"}
    assert adapt(tmp_path / "run", base, steps=1, **fields).code == 0
    result = command("export_hf", tmp_path / "out", init=tmp_path / "run", adapter=True)
    assert (result.code, "norm/scale too, which is no low-rank pair" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lora__pattern": ".*attn.*"},
            "matches no matrix of the model; there are stack_0/layer_0/attention/",
        ),
        ({"train__trainable": "lora", "lora__rank": 0}, "lora asks for pairs; give lora.rank too"),
        ({"train__trainable": "nothing"}, "config.train.trainable: the pattern 'nothing'"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(fields, message, adapt, base, tmp_path):
    result = adapt(tmp_path / "run", base, **fields)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_pairs_want_a_trained_model(command, tmp_path):
    result = command("pretrain", tmp_path / "run", lora__rank=2)
    assert result.code == 2
    assert "config.lora.rank: pairs are trained beside a trained model" in result.err
