"""Scripts of `launch/` run with programs that stand for others and note how they are called."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

_PYTHON = """#!{python} -S
import json, os, signal, sys, time
from pathlib import Path

if sys.argv[1] == "-c":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
folder = Path({folder!r})
process = next((a[10:] for a in sys.argv if a.startswith("--process=")), None)
process = int(process or os.environ.get("SLURM_PROCID", 0))
life = len(list(folder.glob(f"called-{{process}}-*")))
note = folder / f"called-{{process}}-{{life}}.json"
plan = json.loads((folder / "plan.json").read_text())
signals = []


def write():
    called = {{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}}
    half = folder / f"half-{{process}}"
    half.write_text(json.dumps(called | {{"signals": signals}}))
    half.rename(note)


def got(number, frame):
    signals.append(signal.Signals(number).name)
    write()


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, got)
write()
lives = plan[process % len(plan)]
for action in str(lives[min(life, len(lives) - 1)]).split():
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "until_signal":
        while not signals:
            time.sleep(0.02)
    elif action == "until_two_signals":
        while len(signals) < 2:
            time.sleep(0.02)
    elif action == "for_ever":
        while True:
            time.sleep(0.02)
    elif action.startswith("sleep:"):
        time.sleep(float(action[6:]))
    elif action.startswith("save:"):
        workdir = next(a[10:] for a in sys.argv if a.startswith("--workdir="))
        (Path(workdir) / "checkpoints" / action[5:]).mkdir(parents=True, exist_ok=True)
    else:
        sys.exit(int(action))
"""

_RECORDER = """#!{python} -S
import json, os, sys
from pathlib import Path

with Path({log!r}).open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
{body}
"""


class FakePython:
    """Stands for the interpreter: what `python -m jaxllm.main` does in each life is a plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "python"
        self.path.write_text(_PYTHON.format(python=sys.executable, folder=str(folder)))
        self.path.chmod(0o755)

    def plan(self, *processes: Sequence[str | int]) -> None:
        """For each process what it does in each life; the last stands for all lives after it.

        Words, done in turn: an exit code, `kill`, `until_signal`, `until_two_signals`, `for_ever`,
        `sleep:SECONDS`, `save:STEP`.
        """
        (self.folder / "plan.json").write_text(json.dumps(processes))

    def calls(self, process: int = 0) -> list[dict[str, Any]]:
        """How a process was called in each of its lives, with the signals that it got."""
        paths = sorted(
            self.folder.glob(f"called-{process}-*.json"), key=lambda p: int(p.stem.split("-")[2])
        )
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def fake_python(tmp_path) -> FakePython:
    folder = tmp_path / "fake"
    folder.mkdir()
    return FakePython(folder)


class Recorded:
    """A folder of programs for PATH, which note their arguments and do what a snippet says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def program(self, name: str, body: str = "") -> None:
        path = self.folder / name
        text = _RECORDER.format(
            python=sys.executable, log=str(self.folder / f"{name}.log"), body=body
        )
        path.write_text(text)
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        log = self.folder / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def path(self) -> str:
        return f"{self.folder}:{os.environ['PATH']}"


@pytest.fixture
def recorded(tmp_path) -> Recorded:
    folder = tmp_path / "bin"
    folder.mkdir()
    return Recorded(folder)


@pytest.fixture
def environment() -> dict[str, str]:
    """This environment, without what tells JAX of devices or a script what to do."""
    unwanted = ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in unwanted and not name.startswith(("SLURM_", "TPU_"))
    }


@pytest.fixture
def run_script(environment):
    """Runs a script of `launch/` to its end."""

    def run(
        script: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=environment | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def start_script(environment):
    """Starts a script of `launch/` in a process group of its own."""
    started = []

    def start(
        script: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env=environment | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def eventually():
    """Waits for a condition, and returns what it is."""

    def wait(condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)
        return found

    return wait
