"""How each class is told from the others, for the report: a table, and the confusion matrix."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.reporting import quantities
from jaxllm.reporting.scores import Matrix

_MOST = 40  # classes whose confusions are shown: more are no table to be read


class Cell(NamedTuple):
    """Texts of one class that were taken to be of one."""

    text: str
    share: float
    """Of the texts of their class, 0 to 1: how dark the cell is."""
    right: bool


class Confusion(NamedTuple):
    """A row for each class that texts are of, a column for each that they were taken to be of."""

    names: list[str]
    rows: list[tuple[str, list[Cell]]]


def class_table(classes: Mapping[str, Any]) -> Matrix | None:
    """The scores of each class, of what `classes.json` holds; None without any."""
    rows: list[tuple[str, ...]] = [
        (
            each["name"],
            quantities.number(each["texts"]),
            quantities.share(each["precision"]),
            quantities.share(each["recall"]),
            f"{each['f1']:.3f}",
        )
        for each in classes.get("classes", [])
    ]
    header = ("", "held-out texts", "precision", "recall", "F1")
    return Matrix("Classes", header, rows) if rows else None


def confusion(classes: Mapping[str, Any]) -> Confusion | None:
    """The confusion matrix; None if there is none, or more classes than can be read."""
    counts = classes.get("confusion", [])
    if not 0 < len(counts) <= _MOST:
        return None
    names = [each["name"] for each in classes["classes"]]
    rows = []
    for place, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = max(sum(row), 1)
        cells = [
            Cell(f"{count:,}" if count else "", count / total, column == place)
            for column, count in enumerate(row)
        ]
        rows.append((name, cells))
    return Confusion(names, rows)
