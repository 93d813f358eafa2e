"""Tables in a pipe and on a terminal."""

import io

from rich.cells import cell_len

from jaxllm.reporting.tables import print_summary, print_table


def printed(function, *arguments):
    stream = io.StringIO()
    function(*arguments, stream=stream)
    return stream.getvalue()


def test_wide_characters_stay_aligned():
    text = printed(print_table, ["name", "value"], [["中文名字", "1.25"], ["plain", "10.5"]])
    ends = {cell_len(line.rstrip()) for line in text.splitlines() if line.strip().endswith("5")}
    assert len(ends) == 1


def test_a_pipe_gets_no_colours_and_no_wrapping():
    long = "word " * 60
    text = printed(print_table, ["a", "b"], [[long, "1"]], "Title")
    assert "\x1b" not in text and long.strip() in text


def test_cells_are_text_and_not_markup():
    assert "[bold]x[/bold]" in printed(print_table, ["a"], [["[bold]x[/bold]"]])


def test_summary_shows_what_there_is():
    text = printed(
        print_summary,
        {
            "eval/bits_per_byte": 1.61234,
            "time/total": 216.0,
            "eval/loss": float("nan"),
            "other/alpha": 0.25,
        },
    )
    words = [line.split() for line in text.splitlines()]
    assert ["bits", "per", "byte", "1.6123"] in words
    assert ["loss", "nan"] in words
    assert ["total", "3m36s"] in words
    assert ["other/alpha", "0.25"] in words
    assert "gzip" not in text and "Data" not in text
