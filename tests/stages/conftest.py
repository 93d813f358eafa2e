"""A corpus of generated text, and runs of the command in this process that take seconds."""

import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.main import STAGES, main
from jaxllm.sharding.mesh import MeshConfig, make_mesh

SETTINGS = {
    "tokenizer.vocab_size": 300,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.seq_len": 32,
    "data.eval_fraction": 0.2,
    "batch_size": 8,
    "steps": 12,
    "log.every": 1,
    "checkpoint.every": 4,
    "eval.every": 4,
    "max_new_tokens": 4,
    "references": False,
}

TUNING_SETTINGS = {
    "steps": 6,
    "batch_size": 8,
    "data.seq_len": 32,
    "data.eval_fraction": 0.2,
    "log.every": 1,
    "checkpoint.every": 3,
    "eval.every": 3,
    "optimizer.learning_rate": 1e-2,
}

ON_POLICY_SETTINGS = {
    "batch_size": 16,
    "max_new_tokens": 6,
    "rl.max_prompt": 32,
    "rewards": "regex(a)",
    "optimizer.learning_rate": 3e-2,
}

_TEXT_SETTINGS = ("tokenizer.vocab_size", "data.seq_len", "data.eval_fraction")

_CONFIG_FILE = """
from jaxllm.config import config_dict
from {module} import {cls}


def get_config():
    return config_dict({cls}())
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Programs are compiled once for all tests here, also by the processes that tests start."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax.config.jax_compilation_cache_dir


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """60 documents of words that follow one another by a rule, so that there is much to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(40)]
    followers = {word: draw.sample(words, 3) for word in words}
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    with path.open("w") as file:
        for _ in range(60):
            text = [draw.choice(words)]
            for _ in range(draw.randint(20, 80)):
                text.append(draw.choice(followers[text[-1]]))
            file.write(json.dumps({"text": " ".join(text) + "."}) + "\n")
    return path


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """Makes the configuration file of a stage."""
    folder = tmp_path_factory.mktemp("configs")

    def make(stage: str) -> Path:
        path = folder / f"{stage}.py"
        module, cls = STAGES[stage]
        path.write_text(_CONFIG_FILE.format(module=module, cls=cls))
        return path

    return make


@pytest.fixture(scope="session")
def arguments(config_file, corpus):
    """Makes a command line: a stage, a work directory, and fields over the settings above."""

    def make(
        stage: str, workdir: Path | None = None, fields: Mapping[str, Any] | None = None
    ) -> list[str]:
        settings = {**SETTINGS, "data.train": corpus} if stage == "pretrain" else {}
        if stage == "distill":
            own = ("tokenizer.vocab_size", "references")
            settings = {name: value for name, value in SETTINGS.items() if name not in own}
            settings |= {"data.train": corpus, "model.width": 8, "optimizer.learning_rate": 1e-2}
        if stage in ("prepare", "tokenizer"):
            text = {name: SETTINGS[name] for name in _TEXT_SETTINGS}
            settings = {**text, "data.train": corpus}
        if stage in ("sft", "classify", "reward", "dpo"):
            writes = stage in ("sft", "dpo")
            settings = TUNING_SETTINGS | ({"max_new_tokens": 4} if writes else {})
        if stage in ("grpo", "ppo"):
            settings = {name: v for name, v in TUNING_SETTINGS.items() if name != "data.seq_len"}
            settings |= ON_POLICY_SETTINGS
        settings |= {"max_new_tokens": 4} if stage == "generate" else {}
        settings |= fields or {}
        made = [f"--config={config_file(stage)}"]
        made += [f"--workdir={workdir}"] if workdir else []
        return made + [f"--config.{path}={value}" for path, value in settings.items()]

    return make


@pytest.fixture
def command(arguments, compiled, capsys):
    """Runs `jaxllm.main` in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(stage: str, workdir: Path | None = None, **fields: Any) -> Result:
        named = {path.replace("__", "."): value for path, value in fields.items()}
        capsys.readouterr()
        code = main(arguments(stage, workdir, named))
        return Result(code, *capsys.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_run(arguments, compiled, tmp_path_factory) -> Path:
    """The run directory of a run that has ended; tests only read it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments("pretrain", workdir)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return workdir


@pytest.fixture(scope="session")
def json_lines(tmp_path_factory):
    """Writes records to a new file."""

    def write(records, name: str = "records") -> Path:
        path = tmp_path_factory.mktemp("data") / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="session")
def curve():
    """Reads what a run has logged under a name, by step."""

    def read(run: Path, name: str = "eval/loss") -> dict[int, float]:
        logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line[name] for line in logged if name in line}

    return read


@pytest.fixture(scope="session")
def make_teacher(arguments, compiled, tmp_path_factory):
    """Trains a model to tell what follows what, of some layers; its run, which is only read."""

    def make(layers: int) -> Path:
        workdir = tmp_path_factory.mktemp("teacher") / "run"
        fields = {"steps": 60, "optimizer.learning_rate": 2e-2, "eval.every": 60}
        assert main(arguments("pretrain", workdir, fields | {"model.layers": layers})) == 0
        return workdir

    return make


@pytest.fixture
def distil(command, teacher):
    """Distils the model of the run that a module's fixture `teacher` gives."""

    def run(workdir: Path, **fields: Any) -> Result:
        return command("distill", workdir, **{"teacher__init": teacher, **fields})

    return run


@pytest.fixture(scope="session")
def params_of():
    """The parameters of a run's model, as NumPy arrays by path."""

    def load(run: Path) -> dict[str, np.ndarray]:
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            params = load_model(run, mesh).params
        return {path: np.asarray(leaf) for path, leaf in trees.leaves_with_paths(params)}

    return load
