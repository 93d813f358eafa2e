"""Every script of launch/ and of these tests passes shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
SCRIPTS = sorted(
    path
    for folder in (LAUNCH, HERE)
    for path in folder.rglob("*")
    if path.suffix in (".sh", ".sbatch")
)


def test_there_are_scripts():
    names = {path.name for path in SCRIPTS}
    assert {"local.sh", "slurm.sbatch", "tpu_vm.sh", "launch.sh", "start.sh"} <= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    # In the environment of the tests, which need not be on PATH.
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "--shell=bash", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(path):
    assert subprocess.run(["bash", "-n", str(path)], timeout=20).returncode == 0
