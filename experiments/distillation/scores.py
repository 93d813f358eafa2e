"""What students come to as one picture: a row a way, a dot a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

MEASURES = {"eval/bits_per_byte": "bits per byte", "eval/agreement": "agrees with the teacher"}


def draw(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Draws the scores of the runs of each way, by corpus; the teacher's as a line."""
    figure = Figure(figsize=(12, 3.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), len(MEASURES), squeeze=False, sharey="row")
    for row, (corpus, ways) in zip(panels, found.items(), strict=True):
        names = [way for way in ways if way != "teacher"]
        for axes, (measure, title) in zip(row, MEASURES.items(), strict=True):
            for number, way in enumerate(names):
                values = [scores[measure] for scores in ways[way]]
                axes.plot(values, [number] * len(values), "o", color="C0", alpha=0.7)
            if measure in ways.get("teacher", [{}])[0]:
                axes.axvline(ways["teacher"][0][measure], color="0.5", linestyle=":")
            axes.set_title(f"{corpus}: {title}", fontsize=10)
            axes.set_yticks(range(len(names)), names)
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    figure.savefig(path, dpi=110)
