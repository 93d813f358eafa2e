"""Examples as a model sees them, in the terminal: what is learnt stands out from what is not."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from jaxllm.reporting import quantities

_STYLES = {True: "bold green", False: "bright_black"}


class Stretch(NamedTuple):
    """A part of an example."""

    text: str
    learnt: bool


def print_preview(
    examples: Iterable[Sequence[Stretch]],
    counts: Mapping[str, float],
    stream: io.TextIOWrapper | io.StringIO | None = None,
) -> None:
    """Prints examples, and how many tokens are learnt and examples cut or left out.

    Args:
        examples: each as its parts in order.
        counts: `data/trained_tokens`, `data/truncated` and `data/dropped`.
        stream: where to print; standard output by default. In a terminal what is learnt is green
            and all else grey; elsewhere it stands between `«` and `»`.
    """
    console = Console(file=stream, highlight=False, soft_wrap=True)
    for number, example in enumerate(examples, start=1):
        console.print(Text(f"─── example {number} ───", style="bold"))
        line = Text()
        for text, learnt in example:
            plain = f"«{text}»" if learnt else text
            line.append(text if console.is_terminal else plain, style=_STYLES[learnt])
        console.print(line)
    told = {
        "tokens learnt": counts["data/trained_tokens"],
        "examples cut": counts["data/truncated"],
        "left out, with nothing to learn in": counts["data/dropped"],
    }
    console.print(", ".join(f"{name}: {quantities.number(n)}" for name, n in told.items()))
