"""Runs of several sizes and budgets: planned, made as processes of their own, and found again.

A run is made by the command that a user would give, `python -m jaxllm.main`, and has a run
directory of its own; so one that is finished is left alone, and one that was cut off goes on.
"""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import trees
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import Preempted, UserError
from jaxllm.files import write_json
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.reporting import quantities
from jaxllm.reporting.tables import print_table
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER
from jaxllm.stages.prepare import PrepareConfig
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.tokenizers.config import TokenizerConfig

TEXT = "text"
"""The run of `prepare` whose tokens and tokenizer all others read."""
RUNS = "runs"
"""The folder of the runs."""
_POLL_SECONDS = 0.2
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Sizes and budgets of which all pairs are trained, as `pretrain` says but for what follows
    from them."""

    sizes: str = ""
    """Models as LAYERSxWIDTH or LAYERSxWIDTHxHEADS, separated by commas; empty: no runs."""
    budgets: str = ""
    """FLOPs of a run, C = 6 N D, separated by commas, as in 1e12,3e12."""
    head_width: int = 32
    """Of a size without heads: width is divided into heads of this width, or is one head."""
    rate_exponent: float = 0.0
    """The learning rate is that of `pretrain.optimizer` at the width of `pretrain.model`, and falls
    with the width to this power: 1 as the dial of configs/pretrain.py has it for AdamW; 0 where it
    does not depend on the width."""
    max_epochs: float = 4.0
    """Leave out runs that would read their text more often: what is read again counts less."""
    min_updates: int = 50
    """Leave out runs of fewer updates."""
    evaluations: int = 20
    """Of a run while it learns: the points of its curve."""
    at_once: int = 1
    """Runs at the same time; each has its share of the CPU cores and of the GPUs."""

    def __post_init__(self) -> None:
        for name in ("head_width", "evaluations", "at_once", "min_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if self.max_epochs <= 0:
            raise ValueError("max_epochs: must be above 0")
        if bool(self.sizes) != bool(self.budgets):
            raise ValueError("sizes: give sizes and budgets, or neither")
        for text in _listed(self.sizes):
            if not _SIZE.fullmatch(text):
                raise ValueError(f"sizes: {text!r} is not LAYERSxWIDTH or LAYERSxWIDTHxHEADS")
        self.flops()

    def flops(self) -> list[float]:
        """The budgets."""
        return numbers(self.budgets, "budgets")


class Planned(NamedTuple):
    """A run of a sweep."""

    name: str
    parameters: int
    tokens: int
    updates: int
    config: PretrainConfig

    @property
    def flops(self) -> float:
        """C = 6 N D, as it comes out in whole updates."""
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens


def numbers(text: str, field: str) -> list[float]:
    """Numbers above 0 that are separated by commas.

    Raises:
        ValueError: one is none.
    """
    found = []
    for part in _listed(text):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"{field}: {part!r} is no number above 0, as in 1e12,3e12")
        found.append(value)
    return found


def plan(sweep: SweepConfig, base: PretrainConfig) -> list[Planned]:
    """All pairs of a size and a budget, of small budgets first."""
    planned = []
    for flops in sorted(sweep.flops()):
        for size in _listed(sweep.sizes):
            planned.append(_planned(sweep, base, size, flops))
    return planned


def make(sweep: SweepConfig, base: PretrainConfig, folder: Path) -> Path:
    """Makes what is missing of text and runs; where the runs are.

    Raises:
        UserError: a run cannot be made, or none is left.
        Preempted: a signal came; runs under way have saved themselves.
    """
    text = folder / TEXT
    data = dataclasses.replace(base.data, store=base.data.store or str(text.resolve()))
    prepare = PrepareConfig(data=data, tokenizer=base.tokenizer)
    _run_all({TEXT: dataclasses.asdict(prepare)}, folder, 1)
    tokenizer = TokenizerConfig(path=str((text / "tokenizer").resolve()))
    base = dataclasses.replace(base, data=data, tokenizer=tokenizer)
    unique = RunDirectory(text).final_scores()["data/train_tokens"]
    runs = plan(sweep, _with_vocabulary(base, tokenizer))
    left_out = {run.name: _left_out(sweep, run, unique) for run in runs}
    _print_plan(runs, left_out, folder / RUNS, unique)
    todo = {run.name: dataclasses.asdict(run.config) for run in runs if not left_out[run.name]}
    if not todo:
        raise UserError(
            "config.sweep: every run is left out (see the table above); give other budgets or "
            "sizes, more text, or a smaller pretrain.batch_size."
        )
    _run_all(todo, folder / RUNS, sweep.at_once)
    return folder / RUNS


def _left_out(sweep: SweepConfig, run: Planned, unique: float) -> str:
    """Why a run is not made; empty: it is."""
    if run.updates < sweep.min_updates:
        return "left out: too few updates"
    if run.tokens > sweep.max_epochs * unique:
        return "left out: too many epochs"
    return ""


def _planned(sweep: SweepConfig, base: PretrainConfig, size: str, flops: float) -> Planned:
    match = _SIZE.fullmatch(size)
    assert match is not None
    layers, width = int(match[1]), int(match[2])
    heads = int(match[3] or max(1, width // sweep.head_width))
    model = dataclasses.replace(base.model, layers=layers, width=width, heads=heads)
    parameters = trees.size(param_shapes(architecture(model, base.tokenizer.vocab_size)))
    rows = base.batch_size * base.data.seq_len
    steps = round(flops / (FLOPS_PER_PARAMETER * parameters * rows))
    rate = base.optimizer.learning_rate * (base.model.width / width) ** sweep.rate_exponent
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=rate,
        # A short run would not come out of a long warm-up.
        warmup_steps=min(base.optimizer.warmup_steps, steps // 10),
    )
    every = dataclasses.replace(base.eval, every=max(1, steps // sweep.evaluations))
    config = dataclasses.replace(
        base, model=model, optimizer=optimizer, steps=max(1, steps), eval=every
    )
    return Planned(f"{size}-{flops:.4g}".replace("+", ""), parameters, steps * rows, steps, config)


def _with_vocabulary(base: PretrainConfig, tokenizer: TokenizerConfig) -> PretrainConfig:
    """With the size that the tokenizer came out with, for sizes to be counted by."""
    from jaxllm.tokenizers.tokenizer import configured_tokenizer

    size = configured_tokenizer(tokenizer).vocab_size
    return dataclasses.replace(base, tokenizer=dataclasses.replace(tokenizer, vocab_size=size))


def _print_plan(
    runs: list[Planned], left_out: Mapping[str, str], folder: Path, unique: float
) -> None:
    rows = [
        (
            run.name,
            quantities.count(run.parameters),
            quantities.count(run.tokens),
            f"{run.updates:,}",
            f"{run.flops:.3g}",
            f"{run.tokens / run.parameters:.3g}",
            f"{run.tokens / unique:.2g}",
            left_out[run.name]
            or ("done" if RunDirectory(folder / run.name).final_scores() else ""),
        )
        for run in runs
    ]
    header = ("run", "N", "D", "updates", "C", "D/N", "epochs", "")
    print_table(header, rows, title="Sweep", stderr=True)


# -- Processes


def _run_all(configs: Mapping[str, Mapping[str, Any]], folder: Path, at_once: int) -> None:
    """Runs what is not done, so many at once.

    Raises:
        UserError: one ended so; its message is told.
        Preempted: a signal came here or to one of them.
        RuntimeError: one ended otherwise; its log has the traceback.
    """
    waiting = [name for name in configs if not RunDirectory(folder / name).final_scores()]
    total = len(waiting)
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[str, subprocess.Popen]] = {}
    code, failed = 0, ""
    try:
        while running or (waiting and not code):
            for slot in range(at_once):
                if waiting and not code and slot not in running:
                    name = waiting.pop(0)
                    done = total - len(waiting)
                    print(f"{folder / name}: run {done} of {total}", file=sys.stderr, flush=True)
                    running[slot] = name, _started(name, configs[name], folder, slot, at_once)
            time.sleep(_POLL_SECONDS)
            for slot, (name, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode and not code:
                        code, failed = process.returncode, name
    finally:  # a signal to this process, too
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if code:
        raise _error(code, folder / f"{failed}.log")


def _started(
    name: str, config: Mapping[str, Any], folder: Path, slot: int, slots: int
) -> subprocess.Popen:
    """The command of a run, which writes into a log beside its directory."""
    path = folder / f"{name}.json"
    write_json(path, {"config": config})
    command = [sys.executable, "-m", "jaxllm.main", f"--config={path}"]
    with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"--workdir={folder / name}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | _share_of_gpus(slot, slots),
            preexec_fn=_share_of_cores(slot, slots),
        )


def _share_of_cores(slot: int, slots: int) -> Callable[[], None] | None:
    """What gives the process that it is called in every so-many-th CPU core; None where that
    cannot be, or there are not enough."""
    if slots == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))[slot::slots]
    return (lambda: os.sched_setaffinity(0, cores)) if cores else None


def _share_of_gpus(slot: int, slots: int) -> dict[str, str]:
    """The environment in which a process sees every so-many-th GPU."""
    listed = _listed(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    known = Path("/proc/driver/nvidia/gpus")
    if not listed and known.is_dir():
        listed = [str(number) for number in range(len(list(known.iterdir())))]
    mine = listed[slot::slots]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if slots > 1 and mine else {}


def _error(code: int, log: Path) -> BaseException:
    """What a run that ended with `code` has told."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("jaxllm: ") if lines else ""
    if code == UserError.exit_code:
        return UserError(f"{log.stem}: {last}")
    if code == Preempted.exit_code:
        return Preempted(f"{log.stem}: {last}")
    return RuntimeError(f"{log.stem} ended with {code}; see {log}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
