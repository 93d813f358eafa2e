"""Rankings: a prompt and several responses to it, better and worse, as token ids.

A ranking becomes one document with a part for each response, none of which sees the others:

    prompt  response 1  |  prompt  response 2  |  …  |  closing

The tokens of responses, with what ends them, are those that are learnt. The closing token has no
place in a row, so that the end of the last response has one (`packing.PlannedRows`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data.config import DataConfig
from jaxllm.data.preferences import PREFERENCES_VERSION, PreferenceReader
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.store import Encoded, Part
from jaxllm.tokenizers.builtin_templates import BUILTIN_TEMPLATES
from jaxllm.tokenizers.chat_template import ChatTemplate, Message, chat_template
from jaxllm.tokenizers.tokenizer import Tokenizer

_SHORTEST_ROW = 8  # two of a prompt's last token, a token of the response, and what ends it


def check_preference_data(data: DataConfig) -> None:
    """Checks that rankings can lie in rows as the data is packed.

    Raises:
        ValueError: they cannot.
    """
    if data.packing == "concat":
        raise ValueError(
            "data.packing: concat would cut rankings; take best_fit, or none to give each a row of "
            "its own"
        )
    if not data.document_mask:
        raise ValueError("data.document_mask: responses must not see each other; leave it True")
    if data.seq_len < _SHORTEST_ROW:
        raise ValueError(f"data.seq_len: {_SHORTEST_ROW} is the least that holds two responses")


def layout_of(tokenizer: Tokenizer, named: str, field: str) -> ChatTemplate:
    """The template by which prompts and responses are laid out.

    Raises:
        UserError: as `chat_template`.
    """
    own = "" if tokenizer.chat_template else "bos_separated"
    return chat_template(tokenizer, named or own, field)


def joint_of(template: ChatTemplate) -> str:
    """What stands between an instruction and its input in the layout that a template writes."""
    return "" if template.source == BUILTIN_TEMPLATES["bos_separated"][0] else "\n"


@dataclasses.dataclass(frozen=True)
class PreferenceKind:
    """Preferences, laid out by the template that the model speaks by (`corpus.DocumentKind`)."""

    template: ChatTemplate
    unpaired: bool = False
    """See `PreferenceReader`."""

    @property
    def reader(self) -> PreferenceReader:
        """What a record is read as."""
        return PreferenceReader(joint_of(self.template), self.unpaired)

    def encoder(self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments) -> "Rankings":
        """What makes tokens of rankings for rows of `seq_len` places."""
        del split
        return Rankings(dataclasses.replace(self.template, tokenizer=tokenizer), seq_len)


class ResponseIds(NamedTuple):
    """A prompt and a response to it as token ids."""

    prompt: Sequence[int]
    response: Sequence[int]
    """With what ends it."""


def response_ids(
    template: ChatTemplate,
    messages: Sequence[Message],
    responses: Sequence[str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[ResponseIds]:
    """Each response behind the messages, as `template` lays them out.

    Raises:
        UserError: the template cannot render them.
        ValueError: it writes nothing of a response.
    """
    before = 0
    if any(message["role"] == "assistant" for message in messages):
        before = len(template.encode_trained(messages, tools).answers)
    found = []
    for response in responses:
        answer = {"role": "assistant", "content": response}
        ids, _, answers = template.encode_trained([*messages, answer], tools)
        begin, end = answers[-1] if len(answers) > before else (0, 0)
        if begin == end:
            raise ValueError("the template writes nothing of a response")
        found.append(ResponseIds(ids[:begin], ids[begin:end]))  # what follows it is not read
    return found


@dataclasses.dataclass(frozen=True)
class Rankings:
    """Makes tokens of what `PreferenceReader` reads (`store.Encoder`)."""

    template: ChatTemplate
    """By which prompt and response are laid out: the one that the policy answers by."""
    max_length: int
    """Tokens of all responses to a prompt at most, each with the prompt before it: the places of
    a row. What is longer loses the beginning of the prompt; where responses alone are too long,
    their ends."""

    gives_parts = True

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what tokens it gives."""
        tokenizer = self.template.tokenizer.fingerprint
        parts = (PREFERENCES_VERSION, self.template.source, self.max_length, tokenizer)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @property
    def ids_below(self) -> int:
        """See `store.Encoder`."""
        return self.template.tokenizer.vocab_size

    def __call__(self, texts: Sequence[str], workers: int = 0) -> list[Encoded | None]:
        """Tokens of each ranking; None where responses become the same when they are cut.

        Raises:
            UserError: the template cannot render one.
        """
        del workers  # a ranking's texts are few
        return [self._encoded(json.loads(text)) for text in texts]

    def _encoded(self, ranking: Mapping[str, Any]) -> Encoded | None:
        fitted = self.fitted(ranking)
        if fitted is None:
            return None
        ids: list[int] = []
        trained: list[bool] = []
        for each in fitted.responses:
            ids += [*each.prompt, *each.response]
            trained += [False] * len(each.prompt) + [True] * len(each.response)
        sizes = (len(each.prompt) + len(each.response) for each in fitted.responses)
        parts = [Part(size, score) for size, score in zip(sizes, ranking["scores"], strict=True)]
        closing = self.template.tokenizer.eos_id
        return Encoded([*ids, closing], [*trained, False], fitted.cut, parts)

    def fitted(self, ranking: Mapping[str, Any]) -> "Fitted | None":
        """The responses of a ranking as they lie in a row; None where that cannot be.

        Raises:
            UserError: the template cannot render them.
        """
        try:
            found = response_ids(
                self.template, ranking["messages"], ranking["responses"], ranking.get("tools")
            )
        except ValueError:
            return None
        fitted = fitted_responses(found, self.max_length)
        size = sum(len(each.prompt) + len(each.response) for each in fitted)
        same = len({tuple(each.response) for each in fitted}) < len(fitted)
        return None if same or size > self.max_length else Fitted(fitted, fitted != found)


class Fitted(NamedTuple):
    """The responses of a ranking as they lie in a row."""

    responses: list[ResponseIds]
    cut: bool
    """Whether they are not whole."""


def fitted_responses(found: Sequence[ResponseIds], places: int) -> list[ResponseIds]:
    """Responses to a prompt, cut so that together they take so many places at most, if that many
    hold them at all.

    The prompt loses its beginning, in front of each response alike. If not even its last token
    would be left, that one is kept, and the longest responses lose their ends.
    """
    if sum(len(each.prompt) + len(each.response) for each in found) <= places:
        return list(found)
    answers = [len(each.response) for each in found]
    room = (places - sum(answers)) // len(found)
    if room < 1:
        answers, room = _levelled(answers, places - len(found)), 1
    return [
        ResponseIds(each.prompt[-room:], each.response[:length])
        for each, length in zip(found, answers, strict=True)
    ]


def _levelled(lengths: Sequence[int], total: int) -> list[int]:
    """The lengths, the largest of them lowered alike until they come to `total`; each is at least
    1."""
    left, level = total, 0
    for rank, length in enumerate(sorted(lengths)):
        level = max(left // (len(lengths) - rank), 1)
        if length > level:
            break
        left -= length
    return [min(length, level) for length in lengths]
