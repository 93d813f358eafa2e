"""`samples.md`: what the model wrote at each evaluation, to be read by people and by the report.

    ## step 500

    **prompt** `"The quick\\nbrown"`

    ```text
    The text that the model wrote.
    ```

and, where it was judged, ` **score** 1.5` behind the prompt. That is a JSON string, so that it
stays on one line and its blanks are seen. Code marks and fences are as long as the text in them
demands, so that no text can break out of its block.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from jaxllm.files import write_atomically

_HEADING = re.compile(r"## step (\d+)")
_PROMPT = re.compile(
    r"\*\*prompt\*\* (?P<mark>`+) ?(?P<json>\".*\") ?(?P=mark)(?: \*\*score\*\* (?P<score>\S+))?"
)
_FENCE = re.compile(r"(?P<fence>`{3,})text")


class Sample(NamedTuple):
    """One generation."""

    step: int
    """Optimizer updates made when it was written."""
    prompt: str
    """What the model was given."""
    text: str
    """What the model wrote, without the prompt."""
    score: float | None = None
    """What that is worth; None: it was not judged."""


def append_samples(
    path: str | os.PathLike,
    step: int,
    samples: list[tuple[str, str]],
    scores: Sequence[float] | None = None,
) -> None:
    """Adds the (prompt, text) pairs of `step` to the file at `path`, with what they are worth.

    Samples of that step and of later ones go first: they are of a run that was killed and
    resumed from before them. If the disk is full, a warning is given and the file stays as it is.
    """
    kept = [sample for sample in read_samples(path) if sample.step < step]
    judged = scores if scores is not None else [None] * len(samples)
    kept += [Sample(step, *pair, score) for pair, score in zip(samples, judged, strict=True)]
    try:
        write_atomically(path, _markdown(kept))
    except OSError as error:
        logging.warning("%s: samples of step %d are lost: %s", path, step, error.strerror)


def read_samples(path: str | os.PathLike) -> list[Sample]:
    """Every whole sample in order; an empty list if there is no file."""
    try:
        lines = Path(path).read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    samples = []
    step, prompt, score, position = None, None, None, 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if heading := _HEADING.fullmatch(line):
            step, prompt = int(heading[1]), None
        elif match := _PROMPT.fullmatch(line):
            prompt, score = _json_string(match["json"]), _number(match["score"])
        elif (match := _FENCE.fullmatch(line)) and match["fence"] in lines[position:]:
            end = lines.index(match["fence"], position)
            if step is not None and prompt is not None:
                samples.append(Sample(step, prompt, "\n".join(lines[position:end]), score))
            position, prompt = end + 1, None
    return samples


def _markdown(samples: list[Sample]) -> str:
    parts = ["# Samples\n"]
    step = None
    for sample in samples:
        if sample.step != step:
            step = sample.step
            parts.append(f"## step {step}\n")
        prompt = json.dumps(sample.prompt, ensure_ascii=False)
        mark = "`" * (_longest_backticks(prompt) + 1)
        blank = " " if "`" in prompt else ""
        fence = "`" * max(3, _longest_backticks(sample.text) + 1)
        score = "" if sample.score is None else f" **score** {sample.score:.6g}"
        parts.append(f"**prompt** {mark}{blank}{prompt}{blank}{mark}{score}\n")
        parts.append(f"{fence}text\n{sample.text}\n{fence}\n")
    return "\n".join(parts)


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _json_string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
