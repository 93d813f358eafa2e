"""The `scaling` stage: laws fitted to runs, and what they say of a budget; the runs too, if wanted.

Nothing of it uses an accelerator but the runs of a sweep, which are processes of their own.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import config as configuration
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.reporting.report import write_report
from jaxllm.reporting.tables import print_summary
from jaxllm.scaling.downstream import SigmoidLaw, fit_sigmoid
from jaxllm.scaling.estimates import (
    APPROACHES,
    Estimate,
    Sureness,
    budget_scores,
    estimate,
    held_out_scores,
    law_scores,
    residual,
)
from jaxllm.scaling.figures import figures, score_figures
from jaxllm.scaling.frontiers import by_budget
from jaxllm.scaling.measured import COUNTS, MeasuredRun, as_runs, joined, read_runs
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.stages.sweep import SweepConfig, listed, make, numbers


@dataclasses.dataclass(frozen=True)
class ScalingDataConfig:
    """The runs that laws are fitted to."""

    train: str = ""
    """Run directories of `pretrain`, folders of such, and tables (`.csv`), or globs of them,
    separated by commas; those of the sweep come beside them."""
    evaluations: str = ""
    """Run directories of `evaluate`, whose scores join those of the run that they measured."""
    loss: str = "eval/loss"
    """The loss of runs in `summary.json` and `metrics.jsonl`, in nats a token."""


@dataclasses.dataclass(frozen=True)
class ScalingLawConfig:
    """How laws are fitted, and what they are asked."""

    approaches: str = ""
    """`envelope`, `isoflop` and `parametric` (1, 2 and 3 of Hoffmann et al. 2022), separated by
    commas; empty: each for which there are the runs, the others with what they want told."""
    count: str = "all"
    """Which parameters N counts: `all`, or `non_embedding`; the law by the other count is told
    beside it, where runs tell both."""
    repeated: bool = False
    """Tell what tokens count that are read again (Muennighoff et al. 2023)."""
    unique_tokens: float = 0.0
    """With `repeated`, different tokens that there are for `budgets`; 0: enough."""
    held_out: int = 0
    """Runs of the most FLOPs that are left out of all fits, and predicted."""
    budgets: str = ""
    """FLOPs to spend, separated by commas, as in 1e21,5.76e23: what on, and to what loss."""
    downstream: str = ""
    """Scores of runs, separated by commas, that are fitted as sigmoids of the loss and drawn side
    by side: a continuous and an all-or-nothing one of the same task, say."""
    samples: int = 200
    """Fits of resampled runs that intervals are made of."""
    level: float = 0.9
    """Of the intervals."""
    seed: int = 0
    """Of resampling."""

    def __post_init__(self) -> None:
        if self.count not in COUNTS:
            raise ValueError(f"count: must be one of {', '.join(COUNTS)}; was {self.count!r}")
        unknown = [name for name in self.approach_names() if name not in APPROACHES]
        if unknown:
            raise ValueError(f"approaches: {unknown[0]!r} is none of {', '.join(APPROACHES)}")
        if not 0 < self.level < 1:
            raise ValueError("level: must be between 0 and 1")
        if self.samples < 10:
            raise ValueError("samples: must be at least 10")
        if self.held_out < 0:
            raise ValueError("held_out: must not be negative")
        if self.unique_tokens < 0:
            raise ValueError("unique_tokens: must not be negative")
        if self.unique_tokens and not self.repeated:
            raise ValueError("unique_tokens: says nothing without scaling.repeated=True")
        numbers(self.budgets, "budgets")

    def approach_names(self) -> list[str]:
        """Those that are asked for; none: what can be."""
        return listed(self.approaches)


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """Laws of the loss by size, data and compute, fitted to runs; or to a sweep, made for it."""

    stage: str = "scaling"
    """Always `scaling`."""
    data: ScalingDataConfig = ScalingDataConfig()
    scaling: ScalingLawConfig = ScalingLawConfig()
    sweep: SweepConfig = SweepConfig()
    pretrain: PretrainConfig = PretrainConfig()
    """What the runs of a sweep share."""


def run(config: ScalingConfig, workdir: Path | None) -> None:
    """Makes the sweep, if there is one, fits the laws and writes `scaling.json`, `summary.json` and
    the report.

    Raises:
        UserError: there are no runs, too few for what is asked, or some that are none.
    """
    if workdir is None:
        raise UserError("--workdir is missing: give the directory to keep the laws in.")
    recorded = dataclasses.asdict(config)
    directory = RunDirectory(workdir)
    # Other questions may be asked of the same runs; those of a sweep check their configurations.
    directory.open(recorded, free=list(configuration.flatten(recorded)))
    sources = listed(config.data.train)
    if config.sweep.sizes:
        # Sizes are counted and curves fitted here; accelerators are left to the runs.
        jax.config.update("jax_platforms", "cpu")
        directory.begin(recorded)
        try:
            sources += map(str, make(config.sweep, config.pretrain, workdir))
        except UserError as error:
            # A run knows its own fields only.
            named = re.sub(r"\bconfig\.(?!sweep\.|json\b)", "config.pretrain.", str(error))
            raise UserError(named) from error
    measured = read_runs(sources, config.data.loss)
    if evaluations := listed(config.data.evaluations):
        measured = joined(measured, evaluations)
    fitted, held_out = _held_out(measured, config.scaling.held_out)
    sigmoids = _downstream(config.scaling, fitted)
    found = _estimates(config.scaling, fitted, config.scaling.count)
    scores = dict(_scores(config.scaling, fitted, held_out, found))
    for name, (law, _) in sigmoids.items():
        values = dataclasses.asdict(law)
        scores |= {f"scaling/downstream/{name}/{key}": value for key, value in values.items()}
    directory.begin(recorded)
    drawn = figures(fitted, held_out, found, config.scaling.count)
    drawn["downstream"] = {name: each for name, (_, each) in sigmoids.items()}
    write_json(directory.scaling, drawn)
    directory.write_summary(scores)
    report = write_report(workdir)
    print_summary(scores)
    print(f"report: {report}")


def _held_out(
    measured: Sequence[MeasuredRun], number: int
) -> tuple[list[MeasuredRun], list[MeasuredRun]]:
    """The runs to fit, and so many of the most FLOPs; of one budget those of the most parameters.

    Runs of a budget come out a little above or below it, as they are of whole updates.
    """
    ordered = sorted(measured, key=lambda run: run.parameters * run.tokens)
    budgets = by_budget(np.asarray([run.parameters * run.tokens for run in ordered]))
    ordered = [
        ordered[index]
        for budget in budgets
        for index in sorted(budget, key=lambda at: ordered[at].parameters)
    ]
    if number >= len(ordered):
        raise UserError(
            f"config.scaling.held_out: {number} of {len(ordered)} runs leaves none to fit; hold "
            "out fewer."
        )
    return ordered[: len(ordered) - number], ordered[len(ordered) - number :]


def _estimates(
    config: ScalingLawConfig, runs: Sequence[MeasuredRun], count: str
) -> dict[str, Estimate]:
    """By approach; those that cannot be, unless they are asked for, are told of.

    Raises:
        UserError: an approach that is asked for cannot be, or none can.
    """
    sure = Sureness(config.samples, config.level, config.seed)
    found, reasons = {}, []
    for approach in config.approach_names() or APPROACHES:
        try:
            found[approach] = estimate(approach, runs, count, config.repeated, sure)
        except UserError as error:
            if config.approaches or (approach == "parametric" and config.repeated):
                raise
            reasons.append(str(error))
    if not found:
        raise UserError(f"config.data.train: {len(runs)} runs are too few for a law: {reasons[-1]}")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return found


def _scores(
    config: ScalingLawConfig,
    fitted: Sequence[MeasuredRun],
    held_out: Sequence[MeasuredRun],
    found: dict[str, Estimate],
) -> Iterator[tuple[str, float]]:
    """All but those of tasks."""
    runs = as_runs(fitted, config.count)
    yield "scaling/runs", float(len(fitted))
    yield "scaling/sizes", float(len(np.unique(runs.parameters)))
    yield from law_scores(found)
    other = next(name for name in COUNTS if name != config.count)
    if all(run.embedding is not None for run in fitted):
        # Runs of one budget are not of one budget by the other count: not approach 2.
        for approach in (name for name in found if name != "isoflop"):
            alone = dataclasses.replace(config, approaches=approach)
            try:
                beside = _estimates(alone, fitted, other)
            except UserError as error:
                print(f"left out, with N of {other} parameters: {error}", file=sys.stderr)
            else:
                yield from law_scores(beside, f"scaling/{other}/")
    unique = config.unique_tokens or np.inf
    for budget in numbers(config.budgets, "budgets"):
        yield from budget_scores(budget, found, unique)
    if "parametric" in found:
        law = found["parametric"]
        yield "scaling/residual", residual(runs, law.law)
        yield from held_out_scores(held_out, law, config.count)


def _downstream(
    config: ScalingLawConfig, measured: Sequence[MeasuredRun]
) -> dict[str, tuple[SigmoidLaw, dict[str, Any]]]:
    """Of each score that is asked for its law, and what is drawn.

    Raises:
        UserError: too few runs have it.
    """
    found = {}
    for name in listed(config.downstream):
        having = [run for run in measured if name in run.scores]
        if not having:
            known = sorted({key for run in measured for key in run.scores})
            raise UserError(
                f"config.scaling.downstream: no run has {name}; they have {', '.join(known)}."
            )
        runs = as_runs(having, config.count)
        scores = np.asarray([run.scores[name] for run in having])
        try:
            law = fit_sigmoid(runs.losses, scores)
        except UserError as error:
            raise UserError(f"config.scaling.downstream: {name}: {error}") from None
        found[name] = law, score_figures(runs, scores, law)
    return found
