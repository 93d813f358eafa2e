"""The command as a user meets it: each mistake is one clear line and exit code 2."""

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from jaxllm import main as module
from jaxllm.errors import Preempted
from jaxllm.main import main

_CONFIG_FILE = """
from jaxllm.config import config_dict
from jaxllm.stages.{stage} import {cls}


def get_config():
    config = config_dict({cls}())
    {line}
    return config
"""


@pytest.fixture(autouse=True)
def _restored_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def config_file(tmp_path):
    def make(stage="pretrain", line=""):
        path = tmp_path / f"{stage}_config.py"
        path.write_text(_CONFIG_FILE.format(stage=stage, cls=f"{stage.title()}Config", line=line))
        return path

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = (" ".join(str(number * word) for word in range(30)) for number in range(20))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def refused(tmp_path, config_file, text, capsys):
    """Runs a command that is to be refused; gives the one line that it says."""

    def run(*fields, stage="pretrain", config=None, workdir=tmp_path / "run", code=2):
        arguments = [f"--config={config or config_file(stage)}"]
        arguments += [f"--workdir={workdir}"] if workdir else []
        if stage == "pretrain":
            arguments += [f"--config.data.train={text}", "--config.tokenizer.vocab_size=273"]
        assert main([*arguments, *fields]) == code
        out, err = capsys.readouterr()
        assert out == ""
        # Progress lines may come first where the data had to be read.
        *progress, line = err.splitlines()
        assert all(line.startswith(("read ", "train tokenizer ", "tokenise ")) for line in progress)
        assert line.startswith("jaxllm: ")
        assert "Traceback" not in err
        return line.removeprefix("jaxllm: ")

    return run


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("--config.stepz=3", "config.stepz: there is no such field; did you mean config.steps?"),
        ("--config.optimizer.learnin_rate=1", "did you mean config.optimizer.learning_rate?"),
        ("--config.steps=many", "config.steps: must be int, and was given 'many'"),
        ("--config.batch_size=12", "config.batch_size: 12 rows cannot be divided over the 8"),
        ("--config.batch_size=8 --config.micro_batch_size=4", "config.micro_batch_size: 4 rows"),
        ("--config.batch_size=8 --config.micro_batch_size=3", "3 does not divide batch_size 8"),
        ("--config.mesh.data=3", "config.mesh: data 3 x fsdp 1 x expert 1 x tensor 1 does not fit"),
        ("--config.mesh.fsdp=5", "does not fit 8 device(s); the product of the axes"),
        ("--config.mesh.fsdp=0", "config.mesh.fsdp: must be positive, or -1"),
        ("--config.mesh.fsdp=-1", "only one axis of the mesh may be -1"),
        ("--config.model.heads=3", "config.model.heads: 3 does not divide width 256"),
        ("--config.model.family=gpt", "config.model.family: 'gpt' is unknown"),
        ("--config.steps=0", "config.steps: must be at least 1"),
        ("--config.optimizer.schedule=cosinus", "config.optimizer.schedule: must be one of"),
        ("--config.data.train=nowhere.jsonl", "config.data.train: nowhere.jsonl: there is no such"),
        ("--config.data.eval=nowhere.txt", "config.data.eval: nowhere.txt: there is no such file"),
        ("--config.data.train=nowhere/*.txt", "the pattern matches no file"),
        ("--config.data.train=builtin:nothing", "builtin:nothing"),
        ("--config.init=nowhere", "nowhere: is no run directory (it has no config.json)"),
        ("--config.tokenizer.path=nowhere", "config.tokenizer.path: nowhere: there is no token"),
        ("--config.tokenizer.vocab_size=5000", "config.tokenizer.vocab_size: is 5000, but the tr"),
        ("--config.tokenizer.vocab_size=20", "config.tokenizer.vocab_size: is 20, but special"),
        ("--config.stage=pretrian", "config.stage: 'pretrian' is unknown; stages are tokenizer"),
    ],
)
def test_a_wrong_field_is_told_in_one_line(refused, tmp_path, field, says):
    assert says in refused(*field.split())
    # What was refused does not stand in the way of the right command.
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_wrong_type_in_the_file_is_told_with_its_line(refused, config_file):
    path = config_file(line="config.steps = 'many'")
    assert refused(config=path).startswith(f"{path}:8: ")


def test_a_file_whose_get_config_raises_is_told(refused, config_file):
    path = config_file(line="raise RuntimeError('not today')")
    assert refused(config=path) == f"{path}:8: RuntimeError: not today"


def test_a_missing_file_and_a_missing_preset_are_told(refused, tmp_path, config_file):
    assert "there is no such file" in refused(config=tmp_path / "nowhere.py")
    assert "has no presets" in refused(config=f"{config_file()}:large")


def test_a_missing_work_directory_is_told(refused):
    assert refused(workdir=None).startswith("--workdir is missing")


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
def test_a_missing_or_wrong_init_is_told(refused, tmp_path, stage):
    assert refused(stage=stage) == (
        "config.init: give the run directory or Hugging Face folder of a model."
    )
    wrong = refused(f"--config.init={tmp_path}", stage=stage)
    assert wrong.startswith(f"{tmp_path}: is no run directory")


def test_a_corpus_with_many_broken_lines_is_refused_and_they_are_listed(refused, text, tmp_path):
    lines = text.read_text().splitlines()
    broken = {2: "{not json", 5: "[1]", 8: '{"txt": "a"}', 11: "", 14: '{"text": 3}', 17: '"a"'}
    text.write_text("\n".join(broken.get(number, line) for number, line in enumerate(lines, 1)))
    message = refused()
    assert "6 of the 20 lines read are bad" in message
    assert f"{text}:2 (not JSON" in message
    assert str(tmp_path / "run" / "rejected.jsonl") in message
    listed = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == list(broken)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_corpus_is_told(refused, text, content):
    text.write_text(content)
    assert str(text) in refused("--config.data.max_bad_fraction=1.0")


def test_a_work_directory_that_is_a_file_is_told(refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    message = refused(workdir=tmp_path / "file")
    assert message == f"--workdir={tmp_path}/file: is a file; give a directory."
    assert "cannot be written" in refused(workdir=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_work_directory_of_another_configuration_is_left_as_it_is(refused, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = {"stage": "pretrain", "seed": 5, "model": {"width": 48}}
    (run / "config.json").write_text(json.dumps({"config": config, "data": {}}))
    (run / "rejected.jsonl").write_text("kept\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = refused()
    assert "config.seed: was 5, now 0" in message
    assert "config.model.width: was 48, now 256" in message
    assert message.endswith("give another --workdir, or the same configuration.")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_weights_and_biases_that_is_missing_is_told(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'jaxllm[wandb]'" in refused("--config.log.wandb=project")


def test_help_is_printed(capsys):
    assert main(["--help"]) == main([]) == 0
    out, err = capsys.readouterr()
    assert "--config=configs/STAGE.py" in out
    assert "pretrain" in out
    assert err == ""


def test_a_signal_before_training_ends_with_75(config_file, capsys, monkeypatch):
    def run(config, workdir):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "run", run)
    assert main([f"--config={config_file()}"]) == 75
    assert capsys.readouterr().err == ("jaxllm: stopped by SIGTERM; run the same command again\n")


def test_a_signal_that_became_another_error_ends_with_75_too(tmp_path, capsys):
    """As it does while Python loads a library written in C."""
    config = tmp_path / "config.py"
    config.write_text(
        "import signal\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "except BaseException:\n"
        "    raise ImportError('initialization failed')\n"
    )
    assert main([f"--config={config}"]) == 75
    assert capsys.readouterr().err == ("jaxllm: stopped by SIGTERM; run the same command again\n")


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.EACCES, 2, "Permission denied"),
        (errno.ENOSPC, 75, "No space left on device; make room, and run the same command again"),
        (errno.EIO, 75, "Input/output error; run the same command again"),
        (errno.ESTALE, 75, "Stale file handle; run the same command again"),
    ],
)
def test_what_a_file_system_refuses_is_told_in_one_line(
    config_file, capsys, monkeypatch, number, code, says
):
    def run(config, workdir):
        raise OSError(number, os.strerror(number), "runs/first/summary.json")

    monkeypatch.setattr(module, "run", run)
    assert main([f"--config={config_file()}"]) == code
    assert capsys.readouterr().err == f"jaxllm: runs/first/summary.json: {says}\n"


def test_anything_else_passes_through(config_file, monkeypatch):
    def run(config, workdir):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(ZeroDivisionError):
        main([f"--config={config_file()}"])


def test_a_preemption_is_no_ordinary_error():
    assert not issubclass(Preempted, Exception)


def test_the_real_process_ends_with_the_same_code_and_line(config_file):
    process = subprocess.run(
        [sys.executable, "-m", "jaxllm.main", f"--config={config_file()}", "--config.stepz=3"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == (
        "jaxllm: config.stepz: there is no such field; did you mean config.steps?\n"
    )


@pytest.mark.parametrize(("flush", "buffered"), [(True, True), (False, True), (False, False)])
def test_an_output_that_nobody_reads_ends_the_program_quietly(
    config_file, capsys, monkeypatch, flush, buffered
):
    def run(config, workdir):
        print("for nobody", flush=flush)

    reading, writing = os.pipe()
    os.close(reading)
    binary = os.fdopen(writing, "wb", -1 if buffered else 0)
    with io.TextIOWrapper(binary, write_through=not buffered) as output:
        # Leaving it flushes, as the end of Python does.
        monkeypatch.setattr(module, "run", run)
        monkeypatch.setattr(sys, "stdout", output)
        assert main([f"--config={config_file()}"]) == 141
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_passes_through(config_file, monkeypatch):
    def run(config, workdir):
        raise BrokenPipeError

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(BrokenPipeError):
        main([f"--config={config_file()}"])
