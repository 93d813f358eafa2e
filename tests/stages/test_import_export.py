"""Weights out of a run and into one, in the format that is published, and every stage between."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import trees
from jaxllm.checkpoints.load import load_model, model_config_of
from jaxllm.sharding.mesh import MeshConfig, make_mesh

WRITE = {"prompt": "a", "temperature": 0}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture
def exported(command, finished_run, tmp_path):
    """The folder of a run that was exported."""
    folder = tmp_path / "exported"
    assert command("export_hf", folder, init=finished_run).code == 0
    return folder


@pytest.fixture
def imported(command, exported, tmp_path):
    """The run directory made of that folder."""
    run = tmp_path / "imported"
    assert command("import_hf", run, init=exported).code == 0
    return run


def params_of(path, mesh):
    with jax.set_mesh(mesh):
        return jax.device_get(load_model(path, mesh).params)


def assert_equal(tree, expected):
    for (path, ours), (other, theirs) in zip(
        trees.leaves_with_paths(tree), trees.leaves_with_paths(expected), strict=True
    ):
        assert path == other
        np.testing.assert_array_equal(ours, theirs, err_msg=path, strict=True)


def test_a_run_that_went_out_and_in_is_the_same_model(
    command, finished_run, exported, imported, mesh
):
    expected = params_of(finished_run, mesh)
    assert_equal(params_of(exported, mesh), expected)
    assert_equal(params_of(imported, mesh), expected)
    written = command("generate", init=finished_run, **WRITE).out
    assert command("generate", init=exported, **WRITE).out == written
    assert command("generate", init=imported, **WRITE).out == written


def test_text_is_measured_alike(command, finished_run, exported, imported, corpus, tmp_path):
    scores = []
    for number, init in enumerate((finished_run, exported, imported)):
        workdir = tmp_path / f"scores{number}"
        fields = {"init": init, "data__eval": corpus, "data__seq_len": 32}
        assert command("evaluate", workdir, **fields).code == 0
        scores.append(json.loads((workdir / "summary.json").read_text())["eval/bits_per_byte"])
    assert scores[0] > 0
    assert scores == [scores[0]] * 3
    result = command("evaluate", init=exported)
    assert result.code == 2
    assert "config.data.eval" in result.err


def test_what_was_imported_is_exported_the_same(command, exported, imported, tmp_path):
    assert command("export_hf", tmp_path / "again", init=imported).code == 0
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_text() == (exported / file).read_text()
    again, before = (
        load_file(path / "model.safetensors") for path in (tmp_path / "again", exported)
    )
    assert again.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(again[name], before[name], strict=True)


def test_a_run_without_a_limit_tells_the_rows_that_it_was_trained_on(exported, mesh):
    config = json.loads((exported / "config.json").read_text())
    assert config["max_position_embeddings"] == 32
    assert config["vocab_size"] == 300
    assert load_model(exported, mesh).context == 32


@pytest.mark.slow
def test_pretraining_goes_on_from_either(command, exported, imported, finished_run, mesh, tmp_path):
    for number, init in enumerate((finished_run, exported, imported)):
        fields = {"init": init, "steps": 2, "checkpoint__every": 1, "seed": 7}
        assert command("pretrain", tmp_path / f"run{number}", **fields).code == 0
    expected = params_of(tmp_path / "run0", mesh)
    assert_equal(params_of(tmp_path / "run1", mesh), expected)
    assert_equal(params_of(tmp_path / "run2", mesh), expected)
    # Once begun it needs the weights no more.
    shutil.rmtree(exported)
    run = tmp_path / "run1"
    assert command("pretrain", run, init=exported, steps=3, checkpoint__every=1, seed=7).code == 0


def test_the_model_of_published_weights_is_kept_but_for_what_may_change(
    command, exported, tmp_path
):
    result = command("pretrain", tmp_path / "wide", init=exported, model__width=32)
    assert result.code == 2
    assert (
        "config.model.width: was given 32, and the parameters of config.init are of" in result.err
    )
    fields = {"init": exported, "steps": 1, "data__seq_len": 48}
    result = command("pretrain", tmp_path / "long", **fields)
    assert result.code == 2
    assert "48 tokens are more than the 32 positions that the model is made for" in result.err
    run = tmp_path / "longer"
    assert command("pretrain", run, **fields, model__max_positions=64).code == 0
    recorded = json.loads((run / "config.json").read_text())["config"]["model"]
    assert (recorded["max_positions"], recorded["vocab_size"]) == (64, 300)


def test_a_padded_embedding_is_kept(command, finished_run, mesh, tmp_path):
    first = tmp_path / "first"
    assert command("pretrain", first, steps=1, model__vocab_size=304).code == 0
    assert command("export_hf", tmp_path / "out", init=first).code == 0
    further = tmp_path / "further"
    assert command("pretrain", further, steps=1, init=tmp_path / "out").code == 0
    assert params_of(further, mesh)["embedding"].shape == (304, 16)
    result = command("pretrain", tmp_path / "few", model__vocab_size=299)
    assert result.code == 2
    assert "config.model.vocab_size: 299 rows of the embedding are fewer than the 300" in result.err


def test_parameters_are_kept_in_the_dtype_that_is_asked_for(command, exported, mesh, tmp_path):
    run = tmp_path / "half"
    assert command("import_hf", run, init=exported, model__param_dtype="bfloat16").code == 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params_of(run, mesh))} == {"bfloat16"}
    assert command("export_hf", tmp_path / "a", init=run).code == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert command("export_hf", tmp_path / "b", init=exported, dtype="bfloat16").code == 0
    halves = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    for name in halves[0]:
        np.testing.assert_array_equal(*(half[name] for half in halves), strict=True)


def test_halved_weights_stay_so_on_an_accelerator(command, exported, mesh, tmp_path, monkeypatch):
    half = tmp_path / "half"
    assert command("export_hf", half, init=exported, dtype="bfloat16").code == 0

    def dtypes(path, model_config=None):
        with jax.set_mesh(mesh):
            params = load_model(path, mesh, model_config).params
        return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}

    assert dtypes(half) == {"float32"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtypes(half) == {"bfloat16"}
    assert dtypes(exported) == {"float32"}
    assert dtypes(half, model_config_of(half)) == {"float32"}  # as it says: for training


def test_only_a_model_of_the_next_token_is_exported(command, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    recorded = json.loads((run / "config.json").read_text())
    recorded["config"]["objective"]["kind"] = "prefix_lm"
    (run / "config.json").write_text(json.dumps(recorded))
    result = command("export_hf", tmp_path / "out", init=run)
    assert result.code == 2
    assert "config.objective.kind: is 'prefix_lm' in" in result.err
    assert "predict the next token" in result.err
    assert not (tmp_path / "out").exists()


def test_an_import_is_made_once_and_refuses_another(command, exported, imported, tmp_path):
    result = command("import_hf", imported, init=exported)
    assert result.code == 0
    assert "the weights are imported already" in result.out
    other = shutil.copytree(exported, tmp_path / "other")
    result = command("import_hf", imported, init=other)
    assert result.code == 2
    assert "config.init: was" in result.err
    result = command("pretrain", imported)
    assert result.code == 2


def test_an_import_that_failed_can_be_done_again(command, exported, tmp_path):
    weights = exported / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    result = command("import_hf", tmp_path / "run", init=exported)
    assert result.code == 2
    assert "model.safetensors: is cut short or damaged" in result.err
    weights.write_bytes(content)
    assert command("import_hf", tmp_path / "run", init=exported).code == 0


def test_mistakes_are_told_in_a_line(command, finished_run, exported, tmp_path):
    assert "--workdir is missing" in command("import_hf", init=exported).err
    assert "--workdir is missing" in command("export_hf", init=finished_run).err
    assert "config.init: give a folder" in command("import_hf", tmp_path / "a").err
    for stage in ("import_hf", "generate"):
        result = command(stage, tmp_path / "a", init="org/name")
        assert result.code == 2
        assert "org/name: is no run directory (it has no config.json), and no folder" in result.err
    result = command("import_hf", tmp_path / "a", init=finished_run)
    assert result.code == 2
    assert "is no folder of published weights, which has a config.json with a" in result.err
    assert command("export_hf", tmp_path / "a").code == 2
    result = command("export_hf", exported, init=finished_run)
    assert result.code == 2
    assert "is there and not empty" in result.err
    assert command("export_hf", tmp_path / "a", init=finished_run, dtype="int8").code == 2
    assert not (tmp_path / "a").exists()


def test_a_configuration_that_cannot_be_read_is_told_alike(command, exported, tmp_path):
    for content in (
        b'{"model_type":',
        b'\xef\xbb\xbf{"model_type": "llama"}',
        b"\xff",
        b"[" * 200_000,
    ):
        (exported / "config.json").write_bytes(content)
        told = {
            command(stage, tmp_path / stage, init=exported).err
            for stage in ("import_hf", "generate")
        }
        assert len(told) == 1
        assert f"jaxllm: {exported}/config.json: cannot be read (" in told.pop()


def test_a_model_that_cannot_be_published_is_told_before_it_is_loaded(command, tmp_path):
    run = tmp_path / "run"
    assert command("pretrain", run, steps=1, model__positions="sinusoidal").code == 0
    result = command("export_hf", tmp_path / "out", init=run)
    assert result.code == 2
    assert "config.model.positions: is 'sinusoidal'; published models of the family" in result.err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_told(command, exported, tmp_path):
    folder = exported
    definition = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": 300, "content": "<more>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    definition["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for stage in ("generate", "import_hf"):
        result = command(stage, tmp_path / stage, init=folder)
        assert result.code == 2
        assert "300 rows of the embedding are fewer than the 301 tokens" in result.err


@pytest.mark.slow
def test_transformers_continue_as_we_do(command, exported):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False).input_ids]
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(made[0], skip_special_tokens=True)
    ours = command("generate", init=exported, **WRITE | {"max_new_tokens": 8}).out
    assert ours.strip("\n") == expected
