"""A fault campaign: runs that are killed, stopped, robbed of their disk and of their checkpoints.

    python experiments/faults/run.py --workdir=runs/faults

Each run trains one small configuration over 1, 2 or 4 processes. Faults of one kind befall it at
moments drawn from a seed, and after each the same command is given again, in a third of the runs
over other processes, devices or another mesh. Every run is judged against one that was left alone:

- it ends with exit code 0, within a few lives, and no life hangs;
- every step is logged once and in order, with the same loss and norm of the gradient, which see
  the whole batch: none was lost or repeated;
- parameters and optimizer state at the end are equal bit for bit where processes, devices and mesh
  stayed the same, else within `trials.TOLERANCE`.

Prints a line for each run and a table; ends with 1 if a run failed. `outcomes.jsonl` tells all of
each run, and what a failed run left stays. README.md has the table as it was seen.

`--task=lora` does so with a run that fine-tunes a model, made first: `sft`, `lora`,
`classify`, `reward`, `dpo`, `grpo` or `ppo`.
`--only=kill,term-one --processes=2 --runs=10` chooses, and options of `jaxllm.main` may follow,
such as `--config.model.width=256`. A full disk needs the right to mount a file system.
"""

import argparse
import itertools
import json
import logging
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from faults import NAMES, can_mount
from lives import ROOT, Command, Topology
from moments import Shape
from outcomes import Outcome, markdown
from trials import APART_SECONDS, LIFE_SECONDS, OTHERS, draw_trial, try_out

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics

SETTINGS = (
    "--config.steps=40",
    "--config.checkpoint.every=8",
    "--config.eval.every=16",
    "--config.log.every=1",
    "--config.log.watchdog=45",  # so that a life that hangs says where
    "--config.batch_size=8",
    "--config.data.eval_fraction=0.2",
    "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=0.001",
)
"""Small, with a log line for each step, and several checkpoints and evaluations to be struck in."""

MODEL = (
    "--config.tokenizer.vocab_size=300",
    "--config.model.layers=2",
    "--config.model.width=64",
    "--config.model.heads=2",
    "--config.max_new_tokens=4",
    "--config.references=False",
)
_ROWS = "--config.data.seq_len=64"
_ROLLOUTS = (
    "--config.rewards=regex(a)",
    "--config.rl.max_prompt=48",
    "--config.max_new_tokens=8",
    "--config.rl.kl_coef=0.1",
    "--config.rl.epochs=3",  # so that most faults come amid a rollout
)
TASKS = {
    "pretrain": ("pretrain.py:tiny", (_ROWS, *MODEL)),
    "sft": ("sft.py", (_ROWS, "--config.max_new_tokens=4")),
    "lora": ("sft.py", (_ROWS, "--config.max_new_tokens=4", "--config.lora.rank=2")),
    "classify": ("classify.py", (_ROWS, "--config.train.trainable=last:1")),
    "reward": ("reward.py", (_ROWS,)),
    "dpo": ("dpo.py", (_ROWS, "--config.max_new_tokens=4", "--config.lora.rank=2")),
    "grpo": ("grpo.py", _ROLLOUTS),
    "ppo": ("ppo.py", _ROLLOUTS),
}
"""What runs do: the configuration, and settings beside those of all."""

ATTEMPTS = 3
"""Draws of a run that was done before its faults could come."""


class Plan(NamedTuple):
    """One run of the campaign, before anything is drawn."""

    number: int
    fault: str
    processes: int


def main(arguments: Sequence[str]) -> int:
    """Runs the campaign; returns the exit code."""
    options, overrides = _options(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax, of every checkpoint that is compared
    # A campaign that is asked to end takes its processes and its mounts with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    shutil.rmtree(options.workdir, ignore_errors=True)
    options.workdir.mkdir(parents=True)
    begin = time.monotonic()
    corpus = options.workdir / "text.jsonl"
    _write_corpus(corpus, options.task)
    command = _command(options, corpus, overrides)
    plans = _plans(options)
    references = {
        processes: _leave_alone(command, processes, options.workdir)
        for processes in sorted({plan.processes for plan in plans})
    }
    outcomes = []
    for plan in plans:
        outcomes.append(_run(plan, command, *references[plan.processes], options))
        print(outcomes[-1], flush=True)
    failed = sum(not outcome.good for outcome in outcomes)
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{markdown(outcomes)}\n")
    print(f"seed {options.seed}: {len(outcomes)} runs in {minutes:.0f} minutes, {failed} failed")
    return 1 if failed else 0


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="pretrain")
    parser.add_argument("--workdir", type=Path, default=Path("runs/faults"))
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--only", default=",".join(NAMES), help="faults (default: %(default)s)")
    parser.add_argument("--processes", default=",".join(map(str, OTHERS)))
    parser.add_argument("--most", type=int, default=2, help="faults of a run at most")
    parser.add_argument(
        "--changing", type=float, default=1 / 3, help="share of runs that change their devices"
    )
    options, overrides = parser.parse_known_args(arguments)
    options.workdir = options.workdir.resolve()
    options.only = options.only.split(",")
    options.processes = [int(number) for number in options.processes.split(",")]
    if unknown := {*options.only} - {*NAMES} | {*options.processes} - {*OTHERS}:
        parser.error(f"unknown: {', '.join(map(str, unknown))}")
    return options, overrides


def _command(options: argparse.Namespace, corpus: Path, overrides: Sequence[str]) -> Command:
    """The command of every run; what is fine-tuned is pretrained first."""
    config, own = TASKS[options.task]
    compiled = options.workdir / "compiled"
    settings = [f"--config.data.train={corpus}", *SETTINGS, *own]
    if options.task != "pretrain":
        base, output = options.workdir / "base", options.workdir / "base.txt"
        pretrain, model = TASKS["pretrain"]
        text = options.workdir / "base.jsonl"
        _write_corpus(text, "pretrain")
        given = [f"--config.data.train={text}", *SETTINGS, *model]
        made = Command(str(ROOT / "configs" / pretrain), given, compiled)
        with made.start(base, Topology(1), output) as life:
            while life.running() and not life.overdue(LIFE_SECONDS, APART_SECONDS):
                time.sleep(0.1)
            if life.end().code != 0:
                sys.exit(f"the model to be fine-tuned could not be trained; see {output}")
        settings.append(f"--config.init={base}")
    return Command(str(ROOT / "configs" / config), [*settings, *overrides], compiled)


def _plans(options: argparse.Namespace) -> list[Plan]:
    """Every kind of fault over every number of processes in turn, in an order that is drawn; four
    processes, which take longest, in every third round."""
    names = options.only
    if "disk-full" in names and not can_mount():
        print("disk-full is left out: no file system can be mounted here")
        names = [name for name in names if name != "disk-full"]
    cells = [
        (name, processes)
        for name in names
        for processes in options.processes
        if processes > 1 or not name.endswith("-one")
    ]
    quick = [cell for cell in cells if cell[1] < 4]
    draw = random.Random(options.seed)
    order: list[tuple[str, int]] = []
    for turn in itertools.cycle((cells, quick or cells, quick or cells)):
        if not cells or len(order) >= options.runs:
            break
        order += draw.sample(turn, len(turn))
    return [Plan(number, *cell) for number, cell in enumerate(order[: options.runs], start=1)]


def _leave_alone(command: Command, processes: int, workdir: Path) -> tuple[RunDirectory, Shape]:
    """The run that others over as many processes are compared with, and its times."""
    run = RunDirectory(workdir / f"alone-{processes}")
    output = workdir / f"alone-{processes}.txt"
    logged: list[float] = []
    with command.start(run.path, Topology(processes), output) as life:
        while life.running() and not life.overdue(LIFE_SECONDS, APART_SECONDS):
            if len(logged) < len(read_metrics(run.metrics)):
                logged.append(life.seconds)
            time.sleep(0.002)
        end = life.end()
    if end.code != 0:
        sys.exit(f"the run that was left alone ended with {end.codes}; see {output}")
    config = run.config()
    steps, every = config["steps"], config["checkpoint"]["every"]
    trained = [line["step"] for line in read_metrics(run.metrics) if "train/loss" in line]
    if trained != list(range(1, steps + 1)):
        sys.exit(f"the run that was left alone logged the steps {trained}; see {output}")
    start, last = logged[0], logged[-1]
    print(
        f"{processes} process(es) left alone: {end.seconds:.0f} s, of which {start:.0f} before the "
        f"first step and {end.seconds - last:.0f} after the last",
        flush=True,
    )
    return run, Shape(steps, every, start, (last - start) / steps, end.seconds - last)


def _run(
    plan: Plan, command: Command, reference: RunDirectory, shape: Shape, options: argparse.Namespace
) -> Outcome:
    """One run; drawn again where it was done before all its faults could come."""
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{options.seed}/{plan.number}/{attempt}")
        trial = draw_trial(*plan, draw, shape, options.most, options.changing)
        outcome = try_out(trial, command, reference, options.workdir)
        with (options.workdir / "outcomes.jsonl").open("a") as file:
            file.write(f"{json.dumps(outcome.record())}\n")
        if not outcome.missed:
            break
    return outcome


def _write_corpus(path: Path, task: str) -> None:
    """Documents of words that follow one another by a rule, so that there is something to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(40)]
    followers = {word: draw.sample(words, 3) for word in words}
    with path.open("w") as file:
        for _ in range(200):
            text = [draw.choice(words)]
            for _ in range(draw.randint(20, 80)):
                text.append(draw.choice(followers[text[-1]]))
            record = {"text": " ".join(text), "label": text[0] < "h"}
            if task in ("grpo", "ppo"):
                record = {"prompt": " ".join(text[:5])}
            if task in ("sft", "lora"):
                record = {"prompt": " ".join(text[:5]), "response": " ".join(text[5:30])}
            if task in ("reward", "dpo"):
                answer = text[5:15]
                shuffled = draw.sample(answer, len(answer))
                record = {"prompt": " ".join(text[:5]), "chosen": " ".join(answer)}
                record["rejected"] = " ".join([*shuffled, draw.choice(words)])
            file.write(f"{json.dumps(record)}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
