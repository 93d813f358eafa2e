"""The prepare stage: made once for others to share, and killed at any moment without harm."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.main import main


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def stores(workdir):
    """Every file under the store, but for the lock."""
    paths = sorted(path for path in (workdir / "store").rglob("*") if path.is_file())
    return {
        str(path.relative_to(workdir)): path.read_bytes() for path in paths if path.name != ".lock"
    }


def test_what_is_prepared_is_found_by_a_training_run(command, tmp_path):
    made = command("prepare", tmp_path / "data", data__packing="best_fit")
    assert made.code == 0, made.err
    assert "rows filled" in made.out
    found = summary(tmp_path / "data")
    assert found["data/train_documents"] + found["data/eval_documents"] == 60
    assert 0.8 < found["data/fill_rate"] <= 1
    assert (tmp_path / "data" / "report.html").exists()
    before = stores(tmp_path / "data")
    trained = command(
        "pretrain",
        tmp_path / "run",
        data__packing="best_fit",
        data__store=tmp_path / "data" / "store",
        tokenizer__path=tmp_path / "data" / "tokenizer",
    )
    assert trained.code == 0, trained.err
    assert "tokenise" not in trained.err
    assert stores(tmp_path / "data") == before
    again = command("prepare", tmp_path / "data", data__packing="best_fit")
    assert again.code == 0
    assert "tokenise" not in again.err


def test_the_configurations_as_they_stand_find_what_the_other_made(corpus, tmp_path, capsys):
    root = Path(__file__).parents[2] / "configs"
    data = [f"--config.data.train={corpus}"]
    made = main(
        [
            f"--config={root / 'prepare.py'}",
            f"--workdir={tmp_path / 'data'}",
            *data,
            "--config.tokenizer.vocab_size=300",
        ]
    )
    assert made == 0
    capsys.readouterr()
    store, tokenizer = tmp_path / "data" / "store", tmp_path / "data" / "tokenizer"
    trained = main(
        [
            f"--config={root / 'pretrain.py'}:tiny",
            f"--workdir={tmp_path / 'run'}",
            *data,
            f"--config.data.store={store}",
            f"--config.tokenizer.path={tokenizer}",
            "--config.steps=1",
            "--config.batch_size=8",  # of the simulated devices
        ]
    )
    assert trained == 0
    errors = capsys.readouterr().err
    assert not [line for line in errors.splitlines() if line.startswith(("read", "tokenise"))]


def test_a_weighted_mixture_is_told_and_its_shares_are_recorded(command, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other_letters = str.maketrans("abcdefghijklmnop", "qrstuvwxyzabcdef")
    texts = [json.loads(line)["text"].translate(other_letters) for line in corpus.open()]
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]))
    result = command("pretrain", tmp_path / "run", data__train=f"{corpus}@60,{other}@41:9")
    assert result.code == 0, result.err
    assert "The weights sum to 101, not 1" in result.err
    assert "Sources" in result.out
    found = summary(tmp_path / "run")
    assert found[f"data/source/{corpus}/share"] == pytest.approx(60 / 101, abs=0.02)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    logged = [line[f"data/source/{other}/share"] for line in lines if "train/loss" in line]
    assert logged[-1] == found[f"data/source/{other}/share"] == pytest.approx(41 / 101, abs=0.02)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Sources</h2>" in page


@pytest.mark.parametrize("moment", ["*.unfinished", "best_fit_*.unfinished"])
def test_killed_while_it_writes_it_ends_with_the_same_store(
    arguments, corpus, tmp_path, moment, large_text
):
    fields = {"data.train": large_text, "data.packing": "best_fit", "data.seq_len": 64}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(arguments("prepare", whole, fields))
    process = start(arguments("prepare", killed, fields))
    deadline = time.monotonic() + 120
    # A folder of this name shows that tokenising, or planning, is under way.
    while not appeared(killed, moment) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    run(arguments("prepare", killed, fields))
    assert stores(killed) == stores(whole)


@pytest.fixture(scope="module")
def large_text(corpus, tmp_path_factory) -> Path:
    """Enough text for its tokenising and planning to be caught in the act."""
    path = tmp_path_factory.mktemp("large") / "text.jsonl"
    lines = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    with path.open("w") as file:
        for number in range(400):
            words = " ".join(lines[(number + k) % len(lines)] for k in range(1 + number % 40))
            file.write(json.dumps({"text": f"{number} {words}"}) + "\n")
    return path


def appeared(folder, name):
    """Whether there is a file of that name; folders on the way may be renamed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return any(folder.rglob(name))
    return False


def start(arguments):
    command = [
        sys.executable,
        "-m",
        "jaxllm.main",
        *arguments,
        "--config.data.cleaning.near_duplicates=0",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run(arguments):
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
