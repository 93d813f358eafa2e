"""Runs of an experiment that begin from each other, each made once by the command of its stage."""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxllm.checkpoints.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]

_LAST = {"export_hf": "config.json", "generate": "generations.jsonl"}
"""What stages without a summary write last."""


class Run(NamedTuple):
    """A run of a stage."""

    stage: str
    init: str
    """The run it begins from, or none."""
    fields: tuple[str, ...]
    others: Mapping[str, str] = MappingProxyType({})
    """Fields that other runs are given by."""
    after: tuple[str, ...] = ()
    """Runs that it reads something of besides."""


def parser(description: str, has_data: bool = True) -> argparse.ArgumentParser:
    """What every such experiment is told; `has_data`: whether it reads files."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--workdir", type=Path, required=True)
    if has_data:
        made.add_argument("--data", type=Path, required=True, help="folder of the files")
    made.add_argument("--only", default=".*", help="regular expression of whole names of runs")
    return made


def make(planned: Mapping[str, Run], folder: Path, only: str) -> int:
    """Makes the runs whose whole name matches, and those that they begin from, unless they are
    there; the exit code of the first that fails, or 0.

    Args:
        planned: all runs by name, each after the one that it begins from.
        folder: where they lie.
        only: regular expression of names.
    """
    wanted = {name for name in planned if re.fullmatch(only, name)}
    for name in reversed(planned):
        if name in wanted:
            run = planned[name]
            wanted |= {run.init, *run.others.values(), *run.after} & planned.keys()
    for name in filter(wanted.__contains__, planned):
        code = _make(name, planned[name], folder)
        if code:
            print(f"{name}: ended with {code}; see {folder / name}.log", file=sys.stderr)
            return code
    return 0


def done(planned: Mapping[str, Run], folder: Path) -> dict[str, Mapping[str, float]]:
    """The final scores of the runs that are there."""
    found = {name: RunDirectory(folder / name).final_scores() for name in planned}
    return {name: scores for name, scores in found.items() if scores}


def _make(name: str, run: Run, folder: Path) -> int:
    """The exit code of a run's stage, whose output goes into a file of the run's name."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name / _LAST.get(run.stage, "summary.json")).exists():
        return 0
    print(f"making {name}", file=sys.stderr)
    given = [*run.fields, *([f"init={folder / run.init}"] if run.init else [])]
    given += [f"{field}={folder / other}" for field, other in run.others.items()]
    command = [sys.executable, "-m", "jaxllm.main", f"--config={ROOT}/configs/{run.stage}.py"]
    command += [f"--workdir={folder / name}", *(f"--config.{field}" for field in given)]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False, cwd=ROOT).returncode
