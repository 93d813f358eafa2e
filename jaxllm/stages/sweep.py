"""Runs of several sizes and budgets: planned, made, and found again.

A run has a run directory of its own, so that one that is finished is left alone, and one that was
cut off goes on.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxllm import trees
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.reporting import quantities
from jaxllm.reporting.tables import print_table
from jaxllm.scaling.laws import FLOPS_PER_PARAMETER
from jaxllm.stages.prepare import PrepareConfig
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.stages.side_by_side import run_all
from jaxllm.tokenizers.config import TokenizerConfig

TEXT = "text"
"""The run of `prepare` whose tokens and tokenizer all others read."""
RUNS = "runs"
"""The folder of the runs."""
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
        for text in listed(self.sizes):
            if not _SIZE.fullmatch(text):
                raise ValueError(f"sizes: {text!r} is not LAYERSxWIDTH or LAYERSxWIDTHxHEADS")
            if listed(self.sizes).count(text) > 1:
                raise ValueError(f"sizes: {text} stands there twice")
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


def listed(text: str) -> list[str]:
    """What is separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, field: str) -> list[float]:
    """Numbers above 0 that are separated by commas.

    Raises:
        ValueError: one is none.
    """
    found = []
    for part in listed(text):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"{field}: {part!r} is no number above 0, as in 1e12,3e12")
        found.append(value)
    return found


def plan(sweep: SweepConfig, base: PretrainConfig) -> list[Planned]:
    """All pairs of a size and a budget, of small budgets first.

    Raises:
        UserError: there is no model of a size.
    """
    return [
        _planned(sweep, base, size, flops)
        for flops in sorted(set(sweep.flops()))
        for size in listed(sweep.sizes)
    ]


def make(sweep: SweepConfig, base: PretrainConfig, folder: Path) -> list[Path]:
    """Makes what is missing of text and runs; the directories of all runs.

    Raises:
        UserError: a run cannot be made, none is left, or what is there is of another configuration.
        Preempted: a signal came; runs under way have saved themselves.
    """
    plan(sweep, base)  # what is wrong with a size is told before anything is made
    text = RunDirectory(folder / TEXT)
    data = dataclasses.replace(base.data, store=base.data.store or str(text.path.resolve()))
    prepare = PrepareConfig(data=data, tokenizer=base.tokenizer)
    run_all({TEXT: prepare}, folder, 1)
    tokenizer = TokenizerConfig(path=str(text.tokenizer.resolve()))
    base = dataclasses.replace(base, data=data, tokenizer=tokenizer)
    unique = text.final_scores()["data/train_tokens"]
    runs = plan(sweep, _with_vocabulary(base, tokenizer))
    left_out = {run.name: _left_out(sweep, run, unique) for run in runs}
    _print_plan(runs, left_out, folder / RUNS, unique)
    todo = {run.name: run.config for run in runs if not left_out[run.name]}
    if not todo:
        raise UserError(
            "config.sweep: every run is left out (see the table above); give other budgets or "
            "sizes, more text, or a smaller pretrain.batch_size."
        )
    run_all(todo, folder / RUNS, sweep.at_once)
    return [folder / RUNS / name for name in todo]


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
    try:
        model = dataclasses.replace(base.model, layers=layers, width=width, heads=heads)
        parameters = trees.size(param_shapes(architecture(model, base.tokenizer.vocab_size)))
    except (ValueError, UserError) as error:
        raise UserError(f"config.sweep.sizes: {size} with {heads} heads: {error}") from None
    row_tokens = base.batch_size * base.data.seq_len
    updates = round(flops / (FLOPS_PER_PARAMETER * parameters * row_tokens))
    steps = max(1, updates)
    rate = base.optimizer.learning_rate * (base.model.width / width) ** sweep.rate_exponent
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=rate,
        # A short run would not come out of a long warm-up.
        warmup_steps=min(base.optimizer.warmup_steps, steps // 10),
    )
    every = dataclasses.replace(base.eval, every=max(1, steps // sweep.evaluations))
    config = dataclasses.replace(base, model=model, optimizer=optimizer, steps=steps, eval=every)
    name = f"{size}-{flops:g}".replace("+", "")
    return Planned(name, parameters, steps * row_tokens, updates, config)


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
