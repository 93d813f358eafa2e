"""The preview: what is learnt can be told from what is not, in a terminal and in a pipe."""

import io

import pytest

from jaxllm.reporting.preview import Stretch, print_preview

EXAMPLES = [
    [Stretch("Q [bold]\n", False), Stretch("A", True), Stretch("?", False)],
    [Stretch("床前" * 60, True)],
]
COUNTS = {"data/trained_tokens": 1234.0, "data/truncated": 5.0, "data/dropped": 0.0}


def test_in_a_pipe_what_is_learnt_stands_in_guillemets():
    stream = io.StringIO()
    print_preview(EXAMPLES, COUNTS, stream)
    assert stream.getvalue().splitlines() == [
        "─── example 1 ───",
        "Q [bold]",
        "«A»?",
        "─── example 2 ───",
        f"«{'床前' * 60}»",
        "tokens learnt: 1,234, examples cut: 5, left out, with nothing to learn in: 0",
    ]


def test_in_a_terminal_it_is_green_and_the_rest_grey(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    print_preview(EXAMPLES, COUNTS, stream)
    assert "\x1b[90mQ [bold]" in stream.getvalue()
    assert "\x1b[1;32mA\x1b[0m" in stream.getvalue()
    assert "«" not in stream.getvalue()


@pytest.mark.parametrize("examples", [[], [[]]])
def test_nothing_to_show_is_no_mistake(examples):
    print_preview(examples, COUNTS, io.StringIO())
