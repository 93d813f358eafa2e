"""A run that averages its parameters: what it evaluates, gives on, and resumes with."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.sharding.mesh import MeshConfig, make_mesh

EMA, STEPS = 0.3, 6
OPTIONS = {
    "train__ema": EMA,
    "train__trainable": "(?!embedding).*",
    "optimizer__schedule": "constant",
    "optimizer__learning_rate": 0.03,
    "optimizer__learning_rates": ".*norm/scale:0.5",
    "optimizer__moment_dtype": "bfloat16",
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
}


# Restored as it is, without a layout.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("averaged")


@pytest.fixture
def averaged_run(runs, command):
    """The run directory of a run to its end."""
    if not (runs / "whole").exists():
        assert command("pretrain", runs / "whole", steps=STEPS, **OPTIONS).code == 0
    return runs / "whole"


def items(run, step):
    """What the checkpoint of a step holds."""
    checkpointer = ocp.PyTreeCheckpointer()
    folder = run.resolve() / "checkpoints" / str(step)
    return [
        jax.tree.map(np.asarray, checkpointer.restore(folder / n)) for n in ("params", "progress")
    ]


def loaded(run):
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        return jax.device_get(load_model(run, mesh).params)


def test_a_later_stage_is_given_the_average(averaged_run):
    given, progress = items(averaged_run, 1)
    average = dict(trees.leaves_with_paths(given))
    for updates in range(1, STEPS):
        _, progress = items(averaged_run, updates + 1)
        decay = min(EMA, (1 + updates) / (10 + updates))
        for path, now in trees.leaves_with_paths(progress["params"]):
            average[path] = decay * average[path] + (1 - decay) * now
    found = dict(trees.leaves_with_paths(loaded(averaged_run)))
    now = dict(trees.leaves_with_paths(progress["params"]))
    assert found.keys() == average.keys()
    assert found.keys() - now.keys() == {"embedding"}  # which is not trained
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, average[path], rtol=1e-5, atol=1e-7, err_msg=path)
        assert path == "embedding" or np.abs(leaf - now[path]).max() > 1e-4


def test_what_is_scored_is_what_is_given_on(averaged_run, command, tmp_path):
    assert command("evaluate", tmp_path / "scores", init=averaged_run).code == 0
    ours = json.loads((averaged_run / "summary.json").read_text())["eval/loss"]
    theirs = json.loads((tmp_path / "scores" / "summary.json").read_text())["eval/loss"]
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_an_interrupted_run_comes_to_the_same_bits(averaged_run, runs, command):
    run = runs / "resumed"
    assert command("pretrain", run, steps=3, **OPTIONS).code == 0
    resumed = command("pretrain", run, steps=STEPS, **OPTIONS)
    assert resumed.code == 0
    assert "going on from step 3 of 6" in resumed.err
    jax.tree.map(np.testing.assert_array_equal, items(run, STEPS), items(averaged_run, STEPS))


def test_a_run_from_another_begins_with_its_average(averaged_run, runs, command):
    run = runs / "later"
    assert (
        command("pretrain", run, init=averaged_run, steps=1, optimizer__learning_rate=0.0).code == 0
    )
    jax.tree.map(np.testing.assert_array_equal, loaded(run), loaded(averaged_run))


def test_what_is_scored_is_what_is_given_on_in_bfloat16_too(runs, command, tmp_path):
    options = {"train__ema": EMA, "model__param_dtype": "bfloat16", "steps": 4}
    assert command("pretrain", runs / "narrow", **options).code == 0
    assert command("evaluate", tmp_path / "scores", init=runs / "narrow").code == 0
    ours = json.loads((runs / "narrow" / "summary.json").read_text())["eval/loss"]
    theirs = json.loads((tmp_path / "scores" / "summary.json").read_text())["eval/loss"]
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer__learning_rates": "embeddings:2"},
            "config.optimizer.learning_rates: the pattern 'embeddings' matches no parameter that "
            "is trained; the paths look like 'embedding', ",
        ),
        (
            {"train__trainable": "lara"},
            "config.train.trainable: the pattern 'lara' matches no parameter; the paths look like ",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_made(
    command, tmp_path, options, message
):
    result = command("pretrain", tmp_path / "run", **options)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()
