"""A text while it is written: its tokens, where it ends, and what of it can be shown already."""

import re

import numpy as np
from jaxtyping import Float, Int

from jaxllm.inference.requests import Completion, Request
from jaxllm.tokenizers.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are not a character yet."""
_PATIENCE = 16
"""Tokens after which bytes are taken to be none."""
_LAST_SIGNS = 300
"""Of a text, that are compared with what makes it pause."""


class Writing:
    """The answer to one request so far.

    Tokens become text behind those before them, the last of the prompt at first: some tokenizers
    leave out a space that would begin a text. Once there, text never changes.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, shown: bool = False) -> None:
        """Begins an answer.

        Args:
            request: what was asked.
            tokenizer: the model's.
            shown: whether the text is to be shown before its end.
        """
        self.request = request
        self.finish = ""
        """As in `Completion`; empty while the text goes on."""
        self._tokenizer = tokenizer
        # Otherwise nothing but the whole text is of interest, and decoding it at once is faster.
        self._token_by_token = shown or bool(request.sampling.stop or request.pause)
        self._pause = re.compile(rf"(?:{request.pause})\Z") if request.pause else None
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        self._text = ""
        last = request.prompt[-1:]
        self._before = () if tokenizer.special_ids.issuperset(last) else last
        self._pending: list[int] = []

    @property
    def is_searched(self) -> bool:
        """Whether what it says may end it."""
        return bool(self.request.sampling.stop or self.request.pause)

    def extend(
        self, ids: Int[np.ndarray, " steps"], log_probs: Float[np.ndarray, " steps"]
    ) -> None:
        """Takes what a burst wrote; -1 is no token."""
        for token, log_prob in zip(ids.tolist(), log_probs.tolist(), strict=True):
            if token < 0 or self.finish:
                return
            self._ids.append(token)
            self._log_probs.append(log_prob)
            ended = token in self.request.stop_ids
            full = len(self._ids) >= self.request.sampling.max_new_tokens
            if not ended:
                self._pending.append(token)
            if self._token_by_token or ended or full:
                self._settle(last=ended or full)
            if not self.finish and (ended or full):
                self.finish = "stop" if ended else "length"

    def completion(self) -> Completion:
        """The finished text."""
        return Completion(tuple(self._ids), tuple(self._log_probs), self._text, self.finish)

    def settled_text(self) -> str:
        """The text but for an end that may be the beginning of a stop string."""
        if self.finish:
            return self._text
        beginnings = (
            length
            for stop in self.request.sampling.stop
            for length in range(1, len(stop))
            if self._text.endswith(stop[:length])
        )
        return self._text[: len(self._text) - max(beginnings, default=0)]

    def _settle(self, last: bool) -> None:
        """Makes text of the pending tokens if they are whole characters, or no more will come."""
        piece = self._decoded()
        if piece.endswith(_INCOMPLETE) and not last and len(self._pending) < _PATIENCE:
            return
        stops = self.request.sampling.stop
        searched = max(0, len(self._text) + 1 - max(map(len, stops), default=0))
        self._text += piece
        self._before, self._pending = tuple(self._pending) or self._before, []
        places = [self._text.find(stop, searched) for stop in stops]
        if found := [place for place in places if place >= 0]:
            self._text, self.finish = self._text[: min(found)], "stop"
        elif self._pause and not last and self._pause.search(self._text[-_LAST_SIGNS:]):
            self.finish = "pause"

    def _decoded(self) -> str:
        """The text of the pending tokens behind that of the tokens before them."""

        def decode(ids: tuple[int, ...]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=False)

        pending = tuple(self._pending)
        before, both = decode(self._before), decode(self._before + pending)
        # Bytes that are no character yet can change how those before them are shown.
        return both[len(before) :] if both.startswith(before) else decode(pending)
