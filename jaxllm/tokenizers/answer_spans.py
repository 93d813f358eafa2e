"""What of a rendered conversation the assistant wrote, told by rendering it and by nothing else.

No text of a message can pretend to be an answer: spans come from what a template writes where, and
never from a search for words or tokens that begin or end a turn.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxllm.errors import UserError

Span = tuple[int, int]
"""Begin and end of characters in a text."""

# Code points that are no characters, for good (https://www.unicode.org/faq/private_use.html).
_NO_CHARACTERS = tuple(
    chr(plane << 16 | low) for plane in range(16, 0, -1) for low in (65534, 65535)
)


@runtime_checkable
class Render(Protocol):
    """Renders messages by a template: `ChatTemplate._render`."""

    def __call__(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = False,
        edges: tuple[str, str] = ("", ""),
    ) -> str: ...


def told_spans(text: str, render_with: Callable[[tuple[str, str]], str]) -> list[Span] | None:
    """The spans inside of the template's `{% generation %}` blocks.

    Args:
        text: the conversation as the template writes it.
        render_with: renders it once more, with these strings at the edges of the blocks.

    Returns:
        The spans in order; None where the template changes what is at the edges, as one does that
        trims a block from outside.
    """
    begin, end = _absent(text)
    pieces = re.split(f"[{begin}{end}]", marked := render_with((begin, end)))
    if "".join(pieces) != text or re.sub(f"[^{begin}{end}]", "", marked) != (begin + end) * (
        len(pieces) // 2
    ):
        return None
    bounds = [0, *itertools.accumulate(map(len, pieces))]
    return list(zip(bounds[1:-1:2], bounds[2::2], strict=True))


def compared_spans(
    text: str, messages: Sequence[Any], render: Render, mark: re.Pattern[str]
) -> list[Span]:
    """The spans that change when the assistant's messages do, for a template that tells nothing.

    Each message of the assistant is exchanged for a code point that is no character: what differs
    is what it made. The span begins where the prompt for its answer ends, if the template writes
    that prompt the same, and takes in the mark that follows the answer, if one does.

    Args:
        text: the conversation as the template writes it.
        messages: the conversation.
        render: renders messages by the template.
        mark: matches the special tokens of the tokenizer.
    """
    stand_in = _absent(text)[0]
    spans: list[Span] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        other = {"role": "assistant", "content": stand_in}
        changed = render([*messages[:place], other, *messages[place + 1 :]])
        begin = _common(text, changed)
        room = min(len(text), len(changed)) - begin
        after = _common(text[::-1], changed[::-1])
        end = len(text) - min(after, room)
        if stand_in not in changed or begin == end:  # the template left the message out
            continue
        with contextlib.suppress(UserError):  # it may refuse what is no whole conversation
            prompt = render(messages[:place], add_generation_prompt=True)
            if len(prompt) <= begin and text.startswith(prompt):
                begin = len(prompt)
        blank = len(text) - end - len(text[end:].lstrip())
        if closing := mark.match(text, end + blank):
            end = closing.end()
        spans.append((max(begin, spans[-1][1] if spans else 0), end))
    return spans


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _absent(text: str) -> tuple[str, str]:
    """Two code points that are no characters, and that `text` does not hold.

    Raises:
        UserError: it holds them all.
    """
    found = [sign for sign in _NO_CHARACTERS if sign not in text][:2]
    if len(found) < 2:
        raise UserError("a message holds code points that Unicode has made no characters of.")
    return found[0], found[1]
