"""A run directory: its configuration, and what it refuses."""

import json

import pytest

from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.sharding.mesh import MeshConfig, make_mesh

CONFIG = {"stage": "pretrain", "steps": 10, "model": {"width": 16}, "mesh": {"data": -1}}


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "first")
    directory.open(CONFIG)
    directory.begin(CONFIG)
    return directory


def test_the_configuration_and_versions_are_kept(run):
    record = json.loads(run.config_path.read_text())
    assert record["config"] == CONFIG == run.config()
    assert {"python", "jaxllm", "jax", "orbax-checkpoint"} <= record["versions"].keys()


def test_nothing_belongs_to_a_run_before_it_begins(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(CONFIG)
    directory.open(CONFIG | {"stage": "evaluate"})
    assert list(directory.path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"steps": 20}, {"mesh": {"data": 4}}, {"log": {"every": 1}}, {"checkpoint": {"keep": 9}}],
)
def test_what_steers_a_run_may_change(run, change):
    run.open(CONFIG | change)


def test_what_a_run_computes_may_not_change(run):
    before = run.config_path.read_bytes()
    with pytest.raises(UserError) as refused:
        run.open(CONFIG | {"model": {"width": 32}, "seed": 1})
    message = str(refused.value)
    assert str(run.path) in message
    assert "config.model.width: was 16, now 32" in message
    assert "config.seed: was None, now 1" in message
    assert "\n" not in message
    assert run.config_path.read_bytes() == before


def test_a_field_that_there_was_not_yet_counts_as_its_default(run):
    defaults = {"model": {"width": 64, "dropout": 0.0}, "ema": 0.0}
    now = CONFIG | {"model": {"width": 16, "dropout": 0.0}, "ema": 0.0}
    run.open(now, defaults)
    with pytest.raises(UserError, match=r"\(config\.ema: was 0\.0, now 0\.5\)"):
        run.open(now | {"ema": 0.5}, defaults)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file; give a directory"):
        RunDirectory(tmp_path / "file").open(CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "below").open(CONFIG)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["summary.json", "items.jsonl", "metrics.jsonl", "samples.md", "report.html"]
)
def test_files_of_somebody_else_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=rf"has {name} and no config\.json"):
        RunDirectory(tmp_path).open(CONFIG)
    RunDirectory(tmp_path).begin(CONFIG)
    RunDirectory(tmp_path).open(CONFIG)


def test_checkpoints_of_somebody_else_are_not_pruned(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    RunDirectory(tmp_path).open(CONFIG)  # a run cut off before it began leaves as much
    (tmp_path / "checkpoints" / "7").mkdir()
    with pytest.raises(UserError, match="has checkpoints/ and no config"):
        RunDirectory(tmp_path).open(CONFIG)


def test_what_a_run_makes_before_it_begins_may_be_there(tmp_path):
    for name in ("store", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "rejected.jsonl").write_text("{}\n")
    RunDirectory(tmp_path).open(CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 3}', '"text"', "null"])
def test_a_damaged_configuration_is_told(run, text):
    run.config_path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        run.config()


def test_a_run_that_has_no_model_is_told(tmp_path):
    directory = RunDirectory(tmp_path / "tokenizer")
    directory.open({"stage": "tokenizer"})
    directory.begin({"stage": "tokenizer"})
    with pytest.raises(UserError, match=r"is of the stage 'tokenizer', which trains no model; gi"):
        load_model(directory.path, make_mesh(MeshConfig()))


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory \(it has no config.json\)"):
        load_model(tmp_path, make_mesh(MeshConfig()))
    with pytest.raises(UserError, match="is no run directory"):
        load_model(tmp_path / "nowhere", make_mesh(MeshConfig()))
