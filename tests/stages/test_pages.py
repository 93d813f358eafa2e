"""The commands of the pages for users run as they stand there, in an empty folder with a run."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.main import main

ROOT = Path(__file__).parent.parent.parent
COMMAND = "python -m jaxllm.main "
TRAINING = tuple(f"configs/{stage}.py" for stage in ("sft", "classify", "reward", "dpo", "distill"))
TUNING = ("lora", "classify", "reward", "dpo", "distill")
SHORT = ["--config.steps=2", "--config.eval.max_batches=2", "--config.data.seq_len=64"]


def commands(page):
    """The commands of the page's `sh` blocks; a here-document is a part of its command."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        block = block.replace("\\\n", " ")
        pattern = r"^[^\n]*<<'(\w+)'\n(?:.*\n)*?\1$|^[^\n]+$"
        yield from (found.group() for found in re.finditer(pattern, block, re.MULTILINE))


@pytest.fixture
def place(finished_run, compiled, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(finished_run, tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


PAGES = [
    "importing.md",
    "generating.md",
    "chatting.md",
    "evaluating.md",
    "sft.md",
    "rewards.md",
    "generate_data.md",
    *(pytest.param(f"{page}.md", marks=pytest.mark.slow) for page in TUNING),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page_run(page, place, capsys):
    found = list(commands(page))
    assert any(command.startswith(COMMAND) for command in found)
    for command in found:
        if command.startswith(COMMAND):
            given = shlex.split(command.removeprefix(COMMAND))
            for argument in given:
                begun = argument.removeprefix("--config.teacher.init=").removeprefix(
                    "--config.init="
                )
                # Another page makes it.
                if begun.startswith("runs/") and not (place / begun).exists():
                    shutil.copytree(place / "runs" / "first", place / begun)
            trains = any(f"--config={config}" in given for config in TRAINING)
            code = main([*given, *(SHORT if trains else [])])
            assert code == 0, f"{command}\n{capsys.readouterr().err}"
        else:
            environment = os.environ | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            }
            done = subprocess.run(
                ["bash", "-c", command], env=environment, capture_output=True, timeout=300
            )
            assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"
