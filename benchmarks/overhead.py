"""What checkpoints and metrics cost the steps of the main job, on CPU.

    python benchmarks/overhead.py [--runs=3] [--pairs=50]

`configs/pretrain.py` saves every 100 steps and has a log line every 10. Here its runs, each a
process of its own on text that was tokenised once, do so in blocks of 30 steps, with a save at
their beginning and a log line every 3, and write as much more often what is written by the clock;
in every other block nothing is saved, recorded or written. So what a recorded block takes longer
than the mean of the bare ones before and after it, seconds apart, is what 100 steps of the main job
take longer. What else the machine does falls on both alike; whole runs beside one another differ by
more than what is to be seen. In both, metrics are read from the device and shown after each step,
and the last step of a block is waited for.

It is told as a share of 100 steps, and beside it how long the loop itself waited for a save.
Evaluations are left out.
"""

import argparse
import dataclasses
import itertools
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
BATCH = 5
"""Neighbouring differences that are taken together to tell how far the mean may be off."""
NEVER = 10**9


class Blocks:
    """Which blocks are recorded: every other one, the second first."""

    def __init__(self) -> None:
        self._recorded = True  # the first step
        self.began: list[float] = []
        """When each block began, the one of step `BLOCK` first."""
        self.waited = 0.0
        """Seconds that the loop had waited for checkpoints when the last one began."""
        self.late = 0
        """Saves that were not written when the next block began, whose time then has their end."""

    def begin(self, waited: float, saving: bool) -> None:
        self.began.append(time.monotonic())
        self._recorded = len(self.began) % 2 == 0
        self.waited = waited
        self.late += saving

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


def work(arguments: list[str]) -> None:
    """Runs the main job in this process, and prints what was measured."""
    from jaxllm import main
    from jaxllm.reporting import event_file, goodput
    from jaxllm.stages import fit

    goodput._WRITE_SECONDS *= BLOCK / STEPS
    event_file._FLUSH_SECONDS *= BLOCK / STEPS
    blocks, train = Blocks(), fit.train

    def gated(run: Any, state: Any) -> Any:
        checkpointer = blocks.only(run.checkpointer, "save")
        saver = blocks.only(checkpointer)

        def save(step: int, *items: Any) -> None:
            blocks.begin(run.ledger.spent("checkpoint"), run.checkpointer._saving is not None)
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
    print(json.dumps({"blocks": seconds, "waited": blocks.waited, "late": blocks.late}))


def measure(workdir: Path, pairs: int, **fields: object) -> dict[str, Any]:
    """A run's seconds of each block, those that its loop waited for checkpoints, and late saves."""
    settings = {"references": False, "eval.every": NEVER, **fields}
    settings |= {"steps": BLOCK * (2 * pairs + 2)}
    settings |= {"log.every": BLOCK // 10, "checkpoint.every": BLOCK}
    command = [sys.executable, __file__, "--worker"]
    command += [f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Prints medians, differences and their standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=50, help="recorded blocks of each run")
    parser.add_argument("--worker", action="store_true")
    options, rest = parser.parse_known_args()
    if options.worker:
        work(rest)
        return
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if options.pairs < 2 * BATCH or options.pairs % BATCH:
        parser.error(f"--pairs: must be a multiple of {BATCH}, from {2 * BATCH} on")
    recorded, bare, costs, waited, late = [], [], [], 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        measure(first, 0)
        prepared = {"data.store": first / "store", "tokenizer.path": first / "tokenizer"}
        for number in range(options.runs):
            run = measure(Path(folder, str(number)), options.pairs, **prepared)
            of_bare, of_recorded = run["blocks"][0::2], run["blocks"][1::2]
            around = zip(of_recorded, itertools.pairwise(of_bare), strict=True)
            costs += [own - statistics.mean(others) for own, others in around]
            bare += of_bare
            recorded += of_recorded
            waited += run["waited"]
            late += run["late"]
    rows = [
        (name, f"{statistics.mean(blocks):.3f}", f"{statistics.median(blocks):.3f}")
        for name, blocks in (("recorded", recorded), ("bare", bare))
    ]
    heads = (f"blocks of {BLOCK} steps", "mean s", "median s")
    print_table(heads, rows, f"{len(costs)} recorded; {late} saves ended in the block after")
    whole = STEPS * statistics.mean(bare) / BLOCK
    # Neighbours share a bare block: the error is that of the means of some.
    means = [statistics.mean(costs[at : at + BATCH]) for at in range(0, len(costs), BATCH)]
    cost, error = statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means))
    waiting = waited / len(costs)
    print(
        f"a save and ten log lines cost {1000 * cost:.0f} ms (standard error {1000 * error:.0f}, "
        f"median {1000 * statistics.median(costs):.0f}): {cost / whole:.2%} (standard error "
        f"{error / whole:.2%}) of {STEPS} steps; of it the loop waits {1000 * waiting:.0f} ms, "
        f"{waiting / whole:.2%}"
    )


if __name__ == "__main__":
    main()
