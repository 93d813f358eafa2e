"""What became of each run, as a line, as JSON and in a table."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from lives import End, Topology


class Fallen(NamedTuple):
    """A fault that came."""

    aim: str
    """When it was to come."""
    done: str
    """What it did."""
    stood: str
    """Where the run stood then."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    number: int
    fault: str
    topology: Topology
    later: Topology
    fallen: Sequence[Fallen]
    ends: Sequence[End]
    """Of each life."""
    missed: bool
    """Whether the run was done before all its faults could come."""
    problems: Sequence[str]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the faults came, and the run is as if they had not."""
        return not self.problems and not self.missed

    def __str__(self) -> str:
        over = str(self.topology)
        over += f" then {self.later}" if self.later != self.topology else ""
        faults = "; ".join(f"{fallen.done} ({fallen.stood})" for fallen in self.fallen)
        codes = ", ".join("/".join(map(str, end.codes)) for end in self.ends)
        verdict = "good" if self.good else "FAILED"
        line = f"{self.number:3} {self.fault:10} {over}: {verdict}, {self.seconds:.0f} s"
        line += f", lives ended with {codes}: {faults or 'no fault came'}"
        return "\n      ".join([line, *self.problems[:5]])

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **dataclasses.asdict(self),
            "topology": str(self.topology),
            "later": str(self.later),
            "fallen": [fallen._asdict() for fallen in self.fallen],
            "ends": [end._asdict() for end in self.ends],
            "good": self.good,
        }


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table by fault and number of processes.

    "Elsewhere" are runs that went on with other devices; "alone" are lives of which a process was
    lost before all had joined, so that the launcher had to end the others; "to the last" is, of
    other lives, the longest time from the end of the first process to that of the last.
    """
    header = (
        "fault",
        "processes",
        "runs",
        "good",
        "elsewhere",
        "faults",
        "lives",
        "exit codes of processes",
        "alone",
        "to the last",
        "seconds a run",
    )
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    ordered = sorted(outcomes, key=_cell)
    for (fault, processes), group in itertools.groupby(ordered, key=_cell):
        runs = list(group)
        ends = [end for run in runs for end in run.ends]
        codes = Counter(code for end in ends for code in end.codes)
        cells = (
            fault,
            processes,
            len(runs),
            sum(run.good for run in runs),
            sum(run.later != run.topology for run in runs),
            sum(len(run.fallen) for run in runs),
            len(ends),
            ", ".join(f"{code} × {count}" for code, count in sorted(codes.items())),
            sum(end.alone for end in ends),
            f"{max((end.apart for end in ends if not end.alone), default=0):.0f} s",
            f"{sum(run.seconds for run in runs) / len(runs):.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _cell(outcome: Outcome) -> tuple[str, int]:
    return outcome.fault, outcome.topology.processes
