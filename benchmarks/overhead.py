"""What checkpoints and metrics cost the steps of the main job, on CPU.

    python benchmarks/overhead.py [--runs=3] [--pairs=50]

`configs/pretrain.py` saves every 100 steps and has a log line every 10. Here its runs, each a
process of its own on text that was tokenised once, do so in blocks of 30 steps, with a save at
their beginning and a log line every 3; and in every other block nothing is saved, recorded or
written. So what a recorded block takes longer than the mean of the bare ones before and after it,
seconds apart, is what 100 steps of the main job take longer. What else the machine does falls on
both alike; whole runs beside one another differ by more than what is to be seen.

It is told as a share of 100 steps, and beside it how long the loop itself waited for a save.
Evaluations are left out.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.reporting.tables import print_table

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain.py"
STEPS = 100
"""Steps of the main job for each of its checkpoints, and ten log lines."""
BLOCK = 30
NEVER = 10**9


class Blocks:
    """Which blocks are recorded: the odd ones, and the end."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._recorded = True  # the first step
        self.began: list[float] = []
        """When each block began, the one of step `BLOCK` first."""
        self.waited = 0.0
        """Seconds that the loop had waited for checkpoints when the last one began."""

    def begin(self, step: int, waited: float) -> None:
        self.began.append(time.monotonic())
        self.waited = waited
        self._recorded = len(self.began) % 2 == 0 or step == self._steps

    def only(self, inner: Any, *methods: str) -> Any:
        """`inner`, of whose `methods` nothing is done in the blocks that are not recorded."""
        return _Gate(lambda name: name in methods and not self._recorded, inner)


class _Gate:
    def __init__(self, closed: Callable[[str], bool], inner: Any) -> None:
        self._closed, self._inner = closed, inner

    def __getattr__(self, name: str) -> Any:
        return _nothing if self._closed(name) else getattr(self._inner, name)


def _nothing(*args: object) -> None:
    pass


def work(arguments: list[str], steps: int) -> None:
    """Runs the main job in this process; prints the seconds of each block, and of the waiting."""
    from jaxllm import main
    from jaxllm.stages import fit

    blocks, train = Blocks(steps), fit.train

    def gated(run: Any, state: Any) -> Any:
        checkpointer = blocks.only(run.checkpointer, "save")
        saver = blocks.only(checkpointer)

        def save(step: int, *items: Any) -> None:
            blocks.begin(step, run.ledger.spent("checkpoint"))
            checkpointer.save(step, *items)

        saver.save = save
        recorder = blocks.only(run.recorder, "record", "flush")
        ledger = blocks.only(run.ledger, "tick", "write")
        run = dataclasses.replace(run, checkpointer=saver, recorder=recorder, ledger=ledger)
        return train(run, state)

    fit.train = gated
    if code := main.main(arguments):
        sys.exit(code)
    seconds = [end - begin for begin, end in zip(blocks.began, blocks.began[1:], strict=False)]
    print(json.dumps({"blocks": seconds, "waited": blocks.waited}))


def measure(workdir: Path, steps: int, **fields: object) -> tuple[list[float], float]:
    """The seconds of each block of a run, and how long its loop waited for checkpoints."""
    settings = {"steps": steps, "references": False, "eval.every": NEVER, **fields}
    settings |= {"log.every": BLOCK // 10, "checkpoint.every": BLOCK}
    command = [sys.executable, __file__, f"--worker={steps}"]
    command += [f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(run.stdout.splitlines()[-1])
    return told["blocks"], told["waited"]


def main() -> None:
    """Prints medians, differences and their standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=50, help="recorded blocks of each run")
    parser.add_argument("--worker", type=int)
    options, rest = parser.parse_known_args()
    if options.pairs < 2:
        parser.error("--pairs: must be at least 2")
    if options.worker:
        work(rest, options.worker)
        return
    recorded, bare, costs, waited = [], [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        measure(first, 1)
        prepared = {"data.store": first / "store", "tokenizer.path": first / "tokenizer"}
        for number in range(options.runs):
            steps = BLOCK * (2 * options.pairs + 2)
            seconds, waiting = measure(Path(folder, str(number)), steps, **prepared)
            bare += seconds[0::2]
            recorded += seconds[1::2]
            around = zip(seconds[0::2], seconds[2::2], strict=False)
            costs += [s - (a + b) / 2 for s, (a, b) in zip(seconds[1::2], around, strict=True)]
            waited += waiting
    rows = [
        (name, f"{1000 * statistics.median(blocks) / BLOCK:.2f}")
        for name, blocks in (("recorded", recorded), ("bare", bare))
    ]
    print_table(("blocks", "median ms a step"), rows, f"{len(costs)} recorded blocks")
    whole = STEPS * statistics.median(bare) / BLOCK
    cost, error = statistics.mean(costs), statistics.stdev(costs) / math.sqrt(len(costs))
    waiting = waited / len(costs)
    print(
        f"a save and ten log lines cost {1000 * cost:.0f} ms (standard error {1000 * error:.0f}, "
        f"median {1000 * statistics.median(costs):.0f}): {cost / whole:.2%} (standard error "
        f"{error / whole:.2%}) of {STEPS} steps; of it the loop waits {1000 * waiting:.0f} ms, "
        f"{waiting / whole:.2%}"
    )


if __name__ == "__main__":
    main()
