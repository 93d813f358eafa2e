"""Aligned tables for the terminal, readable in a pipe too."""

import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxllm.reporting.quantities import Number
from jaxllm.reporting.scores import score_matrices, score_rows

PIPE_WIDTH = 1000
"""Columns assumed where the output is no terminal: nothing is wrapped in a log."""


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str = "",
    stream: io.TextIOWrapper | io.StringIO | None = None,
    stderr: bool = False,
) -> None:
    """Prints rows under a header; the first column is aligned left, the others right.

    Cells are taken literally (no markup) and measured in terminal columns, so Chinese, Japanese
    and Korean text stays aligned. In a pipe there are no colours and no line is wrapped.

    Args:
        header: the name of each column.
        rows: cells, as many per row as `header` has.
        title: a line above; none if empty.
        stream: where to print; standard output by default.
        stderr: print on standard error, where no stream is given.
    """
    table = _table(title)
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="right" if position else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table, stream, stderr)


def print_summary(
    summary: Mapping[str, Number], stream: io.TextIOWrapper | io.StringIO | None = None
) -> None:
    """Prints the final scores of a run (`summary.json`) as one table, a section per group, and
    after it the tables of several things (sources, tokenizers)."""
    table = _table("")
    table.show_header = False
    table.add_column(justify="left")
    table.add_column(justify="right")
    for group, rows in score_rows(summary).items():
        table.add_row(Text(group, style="bold"), "")
        for row in rows:
            table.add_row(Text(f"  {row.label}"), Text(row.text))
        table.add_section()
    if table.row_count:
        _print(table, stream)
    for matrix in score_matrices(summary):
        print_table(matrix.header, matrix.rows, matrix.title, stream)


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _print(
    table: Table, stream: io.TextIOWrapper | io.StringIO | None, stderr: bool = False
) -> None:
    console = Console(file=stream, stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)
