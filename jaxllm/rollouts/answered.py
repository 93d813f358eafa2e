"""What of a teacher's answers is kept to learn from, and as which records."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.inference.teacher import Answer
from jaxllm.tokenizers.chat_template import Message

KEEP = ("all", "best", "first")
COUNTS = ("responses", "kept", "empty", "duplicates", "cut_off", "rejected", "surplus", "tokens")
"""What `Selection` counts: all responses to a prompt, those that are kept, those that are not for
each of five reasons, and tokens of all."""

_READ_OTHERWISE = (
    *("prompt", "messages", "question", "instruction", "input"),
    *("text", "output", "response", "completion", "responses", "chosen", "rejected", "reasoning"),
    *("scores", "margin", "label"),
)
"""Fields that another stage would read for the question or the response, or as said of it."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the answers to one question are kept."""

    least: float = -math.inf
    """What a response must be worth."""
    keep: str = "all"
    """Of those that are: `all`, the `best`, or the `first`."""
    keep_cut_off: bool = True
    """Whether those are kept that have no end."""

    def __call__(
        self, answers: Sequence[Answer], rewards: Sequence[float] | None
    ) -> tuple[list[int], collections.Counter[str]]:
        """The places of those that are kept, in order, and counts by the names of `COUNTS`."""
        counts = collections.Counter(
            responses=len(answers), tokens=sum(answer.tokens or 0 for answer in answers)
        )
        kept: list[int] = []
        seen: set[str] = set()
        for place, answer in enumerate(answers):
            if not answer.text.strip():
                counts["empty"] += 1
            elif answer.text in seen:
                counts["duplicates"] += 1
            elif answer.finish == "length" and not self.keep_cut_off:
                counts["cut_off"] += 1
            elif rewards is not None and rewards[place] < self.least:
                counts["rejected"] += 1
            else:
                kept.append(place)
            seen.add(answer.text)
        counts["surplus"] = len(kept)
        if self.keep == "best" and rewards is not None:
            kept = sorted(kept, key=lambda place: -rewards[place])[:1]  # the first of the best
        elif self.keep == "first":
            kept = kept[:1]
        counts["surplus"] -= len(kept)
        counts["kept"] = len(kept)
        return kept, counts


def record_of(
    fields: Mapping[str, Any], messages: Sequence[Message], answer: Answer, told: Mapping[str, Any]
) -> dict[str, Any]:
    """A record to learn an answer from: `prompt` and `response`, or `messages` where more was said
    than one message.

    What is `told` of the answer follows, and the fields of the record that was asked, so that the
    answer can be judged again. Those of them that would be read in the place of the answer, or that
    are called as something that is told, stand in `record`.
    """
    if len(messages) == 1 and set(messages[0]) == {"role", "content"}:
        exchange = {"prompt": messages[0]["content"], "response": answer.text}
    else:
        said = {"role": "assistant", "content": answer.text}
        exchange = {"messages": [*map(dict, messages), said]}
    taken = {*_READ_OTHERWISE, *told, "record"}
    kept = {name: value for name, value in fields.items() if name not in taken}
    apart = {
        name: value
        for name, value in fields.items()
        if name in taken and exchange.get(name) != value
    }
    return {**exchange, **kept, **told, **({"record": apart} if apart else {})}
