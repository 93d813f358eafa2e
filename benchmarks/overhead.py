"""What checkpoints, metrics and the watch over them cost the steps of the main job, on CPU.

    python benchmarks/overhead.py [--turns=4] [--steps=400]

Runs of `configs/pretrain.py` in turn, each a process of its own, on text that was tokenised once:
`recorded` logs every 10 steps and saves every 100, as the main job does, and `bare`
does neither before its last step. Counted are the seconds from the first step's end to the last
one's, the starting of saves and the waiting for them included, evaluations not. What the first
takes more than the second, a step, is the cost; the share that the ledger of `recorded` gives to
checkpoints is what the loop itself waited for them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxllm.reporting.tables import print_table

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain.py"
NEVER = 10**9
VARIANTS = {
    "recorded": {"log.every": 10, "checkpoint.every": 100},
    "bare": {"log.every": NEVER, "checkpoint.every": NEVER},
}


def run(workdir: Path, steps: int, **fields: object) -> dict[str, float]:
    """Runs the main job; returns the seconds of its life by category."""
    settings = {"steps": steps, "references": False, "eval.every": NEVER, **fields}
    command = [sys.executable, "-m", "jaxllm.main", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True, capture_output=True)
    (life,) = json.loads((workdir / "goodput.json").read_text())
    return life["seconds"]


def main() -> None:
    """Prints medians, ratio and share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    per_step: dict[str, list[float]] = {name: [] for name in VARIANTS}
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        run(first, 1)
        for turn in range(options.turns):
            for name, fields in VARIANTS.items():
                prepared = {"data.store": first / "store", "tokenizer.path": first / "tokenizer"}
                seconds = run(Path(folder, f"{name}_{turn}"), options.steps, **prepared, **fields)
                trained = seconds["step"] + seconds["data_wait"] + seconds["checkpoint"]
                per_step[name].append(1000 * trained / (options.steps - 1))
                if name == "recorded":
                    shares.append(seconds["checkpoint"] / trained)
    medians = {name: statistics.median(values) for name, values in per_step.items()}
    fastest = {name: min(values) for name, values in per_step.items()}
    rows = [(name, f"{medians[name]:.2f}", f"{fastest[name]:.2f}") for name in VARIANTS]
    print_table(("", "median ms a step", "fastest ms"), rows, f"{options.turns} runs of each")
    print(
        f"recorded against bare: {medians['recorded'] / medians['bare'] - 1:+.1%} by medians, "
        f"{fastest['recorded'] / fastest['bare'] - 1:+.1%} by the fastest; the loop waits for "
        f"checkpoints {statistics.median(shares):.2%} of the time"
    )


if __name__ == "__main__":
    main()
