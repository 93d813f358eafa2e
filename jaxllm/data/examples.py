"""Examples: conversations as token ids, and which of them are to be learnt.

Two layouts. In `bos_separated` an answer stands between `bos` and `eos`, and before it what was
asked, with nothing between:

    x  1 2 3 4 5 6 7 8 9 10 11 12 13 14 15       1..7 asked, 8 bos, 9..15 answer, 16 eos
    y  2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    w  0 0 0 0 0 0 1 1 1  1  1  1  1  1  1       loss = Σ over i from bos to eos of -log P(x_i | …)

In `chat` a template writes the conversation, and tells what of it are answers. In both a
conversation may have several turns, and all answers are learnt, each with what ends it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data.conversations import REASONING, ConversationReader
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.store import Encoded
from jaxllm.errors import UserError
from jaxllm.tokenizers.chat_template import ChatTemplate, chat_template
from jaxllm.tokenizers.tokenizer import Tokenizer

EXAMPLES_VERSION = 1
"""Changes when the same conversation may become other tokens."""

LAYOUTS = ("bos_separated", "chat")

_SHOWN = 400  # characters of a record in a message


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """How conversations become tokens, and what of them is learnt."""

    layout: str = "bos_separated"
    """`bos_separated` (what is asked, `bos`, the answer, `eos`) or `chat` (by a template)."""
    template: str = ""
    """Of `chat`: `chatml`, `llama3`, or a file with a Jinja template; empty: the tokenizer's own,
    else the built-in one whose special tokens it has."""
    train_on_bos: bool = True
    """Of `bos_separated`: whether the model learns to write the `bos` before an answer."""
    train_on_prompt: bool = False
    """Whether what is asked is learnt too."""
    max_prompt: int = 0
    """Of `bos_separated`: tokens of what comes before an answer; what is longer loses its end.
    0: only the row limits it."""
    max_answer: int = 0
    """Of `bos_separated`: tokens of an answer; a longer one loses its end, and has no `eos`.
    0: only the row limits it."""

    reasoning: str = "gsm8k"
    """How an answer to a `question` is written that has its reasoning before it: `gsm8k` (then
    `#### n`), `think` (between `<think>` and `</think>`, then the answer), or `leave_out` (the
    answer alone)."""

    def __post_init__(self) -> None:
        if self.reasoning not in REASONING:
            raise ValueError(
                f"reasoning: must be one of {', '.join(REASONING)}; was {self.reasoning!r}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: must be one of {', '.join(LAYOUTS)}; was {self.layout!r}")
        for name in ("max_prompt", "max_answer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")
        for name, layout in _READ_BY.items():
            default = getattr(type(self), name)
            if layout != self.layout and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: the layout {self.layout} does not read it, but only {layout}; "
                    f"leave it at {default!r}"
                )

    @property
    def reader(self) -> ConversationReader:
        """Reads records for this layout."""
        joint = "" if self.layout == "bos_separated" else "\n"
        return ConversationReader(joint, self.reasoning)

    def encoder(
        self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments | None = None
    ) -> "Examples":
        """What makes conversations, whichever, into tokens for rows of `seq_len` places.

        Raises:
            UserError: as `chat_template`.
        """
        named = "bos_separated" if self.layout == "bos_separated" else self.template
        return Examples(self, chat_template(tokenizer, named, "config.sft.template"), seq_len + 1)


_READ_BY = {
    "template": "chat",
    "train_on_bos": "bos_separated",
    "max_prompt": "bos_separated",
    "max_answer": "bos_separated",
}


class _Part(NamedTuple):
    """Tokens in a row that are learnt or not, of one piece of a conversation."""

    ids: Sequence[int]
    trained: bool


@dataclasses.dataclass(frozen=True)
class Examples:
    """Makes tokens of the conversations that `ExamplesConfig.reader` reads (`store.Encoder`)."""

    config: ExamplesConfig
    template: ChatTemplate
    """By which the model is spoken to when it is trained: of `bos_separated` the same layout."""
    max_length: int
    """Tokens of an example at most: one more than a row has places. What is longer loses its end;
    if no token to be learnt is left, all of it is left out."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what tokens it gives."""
        parts = (
            EXAMPLES_VERSION,
            dataclasses.asdict(self.config) | {"template": self.template.source},
            self.max_length,
            self.template.tokenizer.fingerprint,
        )
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    gives_parts = False

    @property
    def ids_below(self) -> int:
        """See `store.Encoder`."""
        return self.template.tokenizer.vocab_size

    def __call__(self, texts: Sequence[str], workers: int = 0) -> list[Encoded | None]:
        """Tokens of each conversation; None if there is nothing to be learnt in it.

        A text mixed in among them is `bos`, its tokens, `eos`, all learnt, and never cut.

        Raises:
            UserError: the template cannot render one; the message shows it.
        """
        records = [json.loads(text) for text in texts]
        encode = self._separated if self.config.layout == "bos_separated" else self._templated
        conversations = iter(encode([r for r in records if "messages" in r], workers))
        plain = [record["text"] for record in records if "messages" not in record]
        tokenizer = self.template.tokenizer
        encoded_texts = iter(tokenizer.encode_batch(plain, workers=workers))
        return [
            next(conversations)
            if "messages" in record
            else Encoded([tokenizer.bos_id, *next(encoded_texts), tokenizer.eos_id])
            for record in records
        ]

    def _separated(
        self, records: Sequence[Mapping[str, Any]], workers: int
    ) -> list[Encoded | None]:
        """In the layout `bos_separated`."""
        turns = [_turns(record["messages"]) for record in records]
        texts = [text for conversation in turns for _, text in conversation]
        encoded = iter(self.template.tokenizer.encode_batch(texts, workers=workers))
        return [
            self._joined([(role, next(encoded)) for role, _ in conversation])
            for conversation in turns
        ]

    def _joined(self, turns: Sequence[tuple[str, Sequence[int]]]) -> Encoded | None:
        config, tokenizer = self.config, self.template.tokenizer
        parts: list[_Part] = []
        cut = False
        for role, ids in turns:
            limit = config.max_answer if role == "assistant" else config.max_prompt
            kept = ids[:limit] if limit else ids
            whole = len(kept) == len(ids)
            cut |= not whole
            if role == "assistant":
                parts.append(_Part([tokenizer.bos_id], config.train_on_bos))
                parts.append(_Part([*kept, *([tokenizer.eos_id] if whole else [])], True))
            else:
                parts.append(_Part(kept, config.train_on_prompt))
        ids = [index for part in parts for index in part.ids]
        trained = [part.trained for part in parts for _ in part.ids]
        return self._fitted(ids, trained, cut)

    def _templated(
        self, records: Sequence[Mapping[str, Any]], workers: int
    ) -> list[Encoded | None]:
        """As the template writes them."""
        del workers  # of a conversation most of the time is Jinja's, which holds Python's lock
        examples = []
        for record in records:
            try:
                found = self.template.encode_trained(record["messages"], record.get("tools"))
            except UserError as error:
                shown = json.dumps(record, ensure_ascii=False)
                shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
                raise UserError(f"{error}; in the record {shown}") from None
            trained = found.trained
            if self.config.train_on_prompt:
                trained = [True] * len(trained)
            examples.append(self._fitted(found.ids, trained, False))
        return examples

    def _fitted(self, ids: list[int], trained: list[bool], cut: bool) -> Encoded | None:
        cut |= len(ids) > self.max_length
        ids, trained = ids[: self.max_length], trained[: self.max_length]
        return Encoded(ids, trained, cut) if any(trained[1:]) else None


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Answers, and what is said between them as one text, as (role, text)."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        role, text = message["role"], said(message)
        if turns and turns[-1][0] != "assistant" != role:
            turns[-1] = turns[-1][0], turns[-1][1] + text
        else:
            turns.append((role, text))
    return turns


def said(message: Mapping[str, Any]) -> str:
    """The text of a message, a call of a tool as JSON."""
    calls = (call.get("function", call) for call in message.get("tool_calls") or ())
    return "\n".join(
        filter(None, (message["content"], *(json.dumps(c, ensure_ascii=False) for c in calls)))
    )
