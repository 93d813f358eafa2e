"""The `scaling` stage: laws of tables and of runs, what they predict, and what is told."""

import csv
import json

import numpy as np
import pytest

from jaxllm.scaling.laws import PARAMETRIC

LAW = PARAMETRIC["chinchilla"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 30 runs of the published law, with a score that follows their loss."""
    rng = np.random.default_rng(0)
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 6)
    parameters = LAW.optimum(flops).parameters * np.tile(np.exp(np.linspace(-1.5, 1.5, 6)), 5)
    tokens = flops / (6 * parameters)
    losses = LAW.loss(parameters, tokens) * np.exp(0.001 * rng.normal(size=30))
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["N", "D", "loss", "embedding_parameters", "right"])
        for n, d, loss in zip(parameters, tokens, losses, strict=True):
            lines.writerow([n, d, loss, 0.1 * n, 1 / (1 + np.exp((loss - 2.8) / 0.2))])
    return path


@pytest.fixture(scope="module")
def settings(table):
    return {"data.train": table, "scaling.samples": 10}


@pytest.fixture
def fitted(command, settings, tmp_path):
    """Runs the stage; its result and its directory."""

    def run(**fields):
        given = settings | {name.replace("__", "."): value for name, value in fields.items()}
        return command("scaling", tmp_path / "laws", **given), tmp_path / "laws"

    return run


def test_the_law_of_a_table_and_what_it_makes_of_a_budget(fitted):
    result, folder = fitted(
        scaling__budgets="5.76e23", scaling__held_out=2, scaling__downstream="right"
    )
    assert result.code == 0, result.err
    scores = json.loads((folder / "summary.json").read_text())
    assert scores["scaling/runs"] == 28
    assert scores["scaling/alpha"] == pytest.approx(LAW.alpha, abs=0.03)
    assert scores["scaling/alpha/low"] < scores["scaling/alpha"] < scores["scaling/alpha/high"]
    assert scores["scaling/isoflop/a"] == pytest.approx(LAW.exponents[0], abs=0.03)
    # A share of all parameters scales as they do.
    assert scores["scaling/non_embedding/alpha"] == pytest.approx(scores["scaling/alpha"], abs=1e-3)
    budget = "scaling/budget/5.76e+23 parametric"
    assert scores[f"{budget}/parameters"] == pytest.approx(32e9, rel=0.5)
    parts = [scores[f"{budget}/loss_{part}"] for part in ("irreducible", "model", "data")]
    assert sum(parts) == pytest.approx(scores[f"{budget}/loss"])
    gained = [scores[f"{budget}/doubling_{what}"] for what in ("parameters", "tokens", "both")]
    assert gained[0] + gained[1] == pytest.approx(gained[2])
    held_out = [name for name in scores if name.startswith("scaling/held_out/")]
    assert len(held_out) == 14
    assert all(abs(scores[name]) < 0.01 for name in held_out if name.endswith("/error"))
    assert scores["scaling/downstream/right/middle"] == pytest.approx(2.8, abs=0.05)
    assert "approach 1 needs curves" in result.err
    page = (folder / "report.html").read_text()
    for title in ("IsoFLOP profiles", "best size of a budget", "beside measured", "right, by loss"):
        assert title in page


def test_curves_give_the_envelope_by_both_counts(fitted, tmp_path):
    lines = ["run,N,D,loss,embedding_parameters"]
    for size in np.geomspace(1e8, 1e10, 6):
        for tokens in 20 * size * np.geomspace(1 / 30, 30, 60):
            loss = LAW.loss(size, tokens)
            lines.append(f"{size:g},{size},{tokens},{loss},{0.1 * size}")
    path = tmp_path / "curves.csv"
    path.write_text("\n".join(lines) + "\n")
    result, folder = fitted(data__train=path, scaling__approaches="envelope")
    assert result.code == 0, result.err
    scores = json.loads((folder / "summary.json").read_text())
    assert scores["scaling/envelope/a"] == pytest.approx(LAW.exponents[0], abs=0.02)
    # A share of all parameters scales as they do.
    assert scores["scaling/non_embedding/envelope/a"] == pytest.approx(
        scores["scaling/envelope/a"], abs=0.005
    )


def test_the_same_again_is_the_same(fitted):
    first, folder = fitted(scaling__approaches="isoflop")
    before = (folder / "summary.json").read_text()
    second, _ = fitted(scaling__approaches="isoflop")
    assert (first.code, second.code) == (0, 0)
    assert (folder / "summary.json").read_text() == before


def test_other_questions_may_be_asked_of_the_same_directory(fitted):
    assert fitted(scaling__approaches="isoflop")[0].code == 0
    assert fitted(scaling__approaches="isoflop", scaling__budgets="1e22")[0].code == 0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"data__train": ""}, "config.data.train: name runs"),
        ({"scaling__approaches": "guess"}, "config.scaling.approaches: 'guess' is none of"),
        ({"scaling__approaches": "envelope"}, "approach 1 needs curves"),
        ({"scaling__repeated": True}, "no run has read its text more than once"),
        ({"scaling__count": "some"}, "config.scaling.count: must be one of"),
        ({"scaling__held_out": 30}, "leaves none to fit"),
        ({"scaling__held_out": 26}, "4 runs are too few for a law"),
        ({"scaling__budgets": "1e21,much"}, "config.scaling.budgets: 'much' is no number above 0"),
        ({"scaling__downstream": "left"}, "no run has left; they have right"),
        ({"scaling__level": 90.0}, "config.scaling.level: must be between 0 and 1"),
        ({"sweep__sizes": "2x16"}, "config.sweep.sizes: give sizes and budgets, or neither"),
        ({"sweep__sizes": "big", "sweep__budgets": "1e9"}, "'big' is not LAYERSxWIDTH"),
    ],
)
def test_what_cannot_be_is_told(fitted, fields, told):
    result, folder = fitted(**fields)
    assert result.code == 2
    assert told in result.err
    assert result.err.count("\n") <= 3
    assert not (folder / "summary.json").exists()


def test_one_size_alone_is_told(fitted, tmp_path):
    path = tmp_path / "one.csv"
    lines = [f"1e6,{tokens},{5 - 0.1 * tokens / 1e7}" for tokens in (1e7, 2e7, 3e7, 4e7, 5e7, 6e7)]
    path.write_text("N,D,loss\n" + "\n".join(lines) + "\n")
    result, _ = fitted(data__train=path)
    assert result.code == 2
    assert "at least 3 sizes (N), and there are 1" in result.err


def test_a_work_directory_is_wanted(command, settings):
    result = command("scaling", **settings)
    assert result.code == 2
    assert "--workdir is missing" in result.err
