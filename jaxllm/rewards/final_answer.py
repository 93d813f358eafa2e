"""Where in a response its answer stands: behind the thinking, between marks, in a box."""

import re

THINK = "<think>"
THINK_END = "</think>"

_ANSWER = "<answer>"
_ANSWER_END = "</answer>"
_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # one behind a backslash is a sign like others


def thinks_from_the_start(prompt: str) -> bool:
    """Whether the prompt has opened the thinking already, as some chat templates do."""
    return prompt.rstrip().endswith(THINK)


def final_answer(prompt: str, response: str) -> str:
    """What a response answers, white space at its ends removed.

    That is what follows the last `</think>`, or the whole response where nothing is thought; empty
    if the thinking has begun and does not end. Of that, what the last `<answer>…</answer>` holds,
    if there is one.
    """
    _, ended, text = response.rpartition(THINK_END)
    if not ended and (THINK in response or thinks_from_the_start(prompt)):
        return ""
    _, begun, rest = text.rpartition(_ANSWER)
    inside, closed, _ = rest.partition(_ANSWER_END)
    return (inside if begun and closed else text).strip()


def boxed(text: str) -> str | None:
    """What the last LaTeX `\\boxed{…}` holds, braces within it included; None if there is none.

    A last one that is not closed counts as none.
    """
    _, found, rest = text.rpartition(_BOX)
    if not found:
        return None
    depth = 1
    for match in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()]
    return None
