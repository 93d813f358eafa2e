"""Competitors in processes of their own that work in turn, so that what else the machine does hits
all alike."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

Step = Callable[[], float | None]
"""Makes a step; may give how much it did, tokens say, and then seconds are those of each."""


def work(run: Step) -> None:
    """A competitor: makes three steps for every line it is given, and answers with the seconds of
    the last two. The first of three is not counted: it finds its memory and the caches taken."""
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            amount = run()
            seconds.append((time.perf_counter() - begin) / (amount or 1))
        print(json.dumps(seconds), flush=True)


def measure(
    script: str, names: Sequence[str], turns: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of every competitor's steps, two a turn; `script --worker NAME` is to call `work`."""
    workers = {name: _start(script, name, environment or {}) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name, process in workers.items():
            assert process.stdin is not None and process.stdout is not None
            time.sleep(0.2)  # threads that spin for more work come to rest
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name] += json.loads(process.stdout.readline())
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return seconds


def compare(
    description: str, script: str, steps: Mapping[str, Callable[[], Step]], what: str
) -> None:
    """The command of a script whose competitors make one step each: measures those that are asked
    for in turn and prints medians and ratios, or is one of them.

    Args:
        description: of the script.
        script: its path.
        steps: what makes the step of each.
        what: a step of what.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", default=",".join(steps))
    parser.add_argument("--worker", choices=steps)
    options = parser.parse_args()
    if options.worker:
        work(steps[options.worker]())
        print(f"{options.worker} {held()}", file=sys.stderr)
        return
    seconds = measure(script, options.only.split(","), options.turns)
    print_medians(seconds, f"A step of {what}, {2 * options.turns} of each")


def print_medians(seconds: Mapping[str, Sequence[float]], title: str) -> None:
    """Prints median and fastest of each, and how many times the first one's median it is."""
    from jaxllm.reporting.tables import print_table

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians))
    rows = [
        (name, f"{median:.2f}", f"{min(seconds[name]):.2f}", f"{median / medians[first]:.2f}")
        for name, median in medians.items()
    ]
    print_table(("", "median s", "fastest s", f"times {first}"), rows, title)


def held() -> str:
    """How much memory this process has held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return f"held {most:,.0f} MB at the most"


def _start(script: str, name: str, environment: Mapping[str, str]) -> subprocess.Popen:
    """The process of a competitor, compiled and warm."""
    process = subprocess.Popen(
        [sys.executable, script, "--worker", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{name} ended with {process.wait()} before its first step; see above")
    return process
