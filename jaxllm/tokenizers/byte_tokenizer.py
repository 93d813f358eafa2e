"""A tokenizer without a vocabulary to learn: a token for each byte of UTF-8."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.files import write_atomically
from jaxllm.tokenizers.interface import HF_FILE, Tokenizer, check_unicode, write_config
from jaxllm.tokenizers.special_ids import Vocabulary, choose_special_ids
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS

KIND_KEY = "jaxllm_kind"
"""Entry of `tokenizer_config.json` by which a saved one is known again."""


class ByteTokenizer(Tokenizer):
    """The special tokens, and after them one id for each of the 256 bytes, in order."""

    def __init__(
        self,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        asked: Mapping[str, str] | None = None,
        declared: Mapping[str, str] | None = None,
    ):
        """Builds the tokenizer whose ids begin with `special_tokens`.

        Args:
            special_tokens: those of today, or those that a saved tokenizer was made with.
            asked: special tokens that the configuration names (`choose_special_ids`).
            declared: special tokens that files beside it name.

        Raises:
            SpecialTokenError: a token that `asked` or `declared` name is not a special one.
        """
        self._special = tuple(special_tokens)
        self._ids = {token: index for index, token in enumerate(self._special)}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest_first)))
        self.vocab_size = len(self._special) + 256
        vocabulary = Vocabulary(self._ids.get, self._special, never_unknown=True)
        special_ids = choose_special_ids(vocabulary, asked or {}, declared or {})
        self._set_special_ids(special_ids, range(len(self._special)))
        identity = f"{special_ids}\n{json.dumps(['bytes', self._special])}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @classmethod
    def from_definition(
        cls, definition: str, asked: Mapping[str, str], declared: Mapping[str, str]
    ) -> "ByteTokenizer":
        """The tokenizer that `save` wrote as `definition`, with the special tokens it had then.

        Raises:
            ValueError: `definition` is not one that `save` writes.
            SpecialTokenError: as the constructor.
        """
        try:
            content = json.loads(definition)
            special_tokens = [token["content"] for token in content["added_tokens"]]
            found = content["model"]["vocab"], content["model"]["merges"]
            vocabulary = _vocabulary(special_tokens)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no tokenizer of bytes ({error!r})") from None
        if found != (vocabulary, []) or len(vocabulary) != len(special_tokens) + 256:
            raise ValueError("it is no tokenizer of bytes (its vocabulary is another)")
        return cls(special_tokens, asked, declared)

    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        check_unicode([text])
        if not parse_special_tokens:
            return self._bytes(text)
        ids, end = [], 0
        for match in self._splitter.finditer(text):
            ids += self._bytes(text[end : match.start()])
            ids.append(self._ids[match[0]])
            end = match.end()
        return ids + self._bytes(text[end:])

    def _bytes(self, text: str) -> list[int]:
        values = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return (values + len(self._special)).tolist()

    def encode_batch(
        self, texts: Sequence[str], parse_special_tokens: bool = False, workers: int = 0
    ) -> list[list[int]]:
        # One core makes Python's integers as fast as several would.
        return [self.encode(text, parse_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        first = len(self._special)
        text = bytearray()
        for index in ids:
            if first <= index < self.vocab_size:
                text.append(index - first)
            elif 0 <= index < first and not skip_special_tokens:
                text += self._special[index].encode()
        return text.decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        write_config(directory, self._settings(self._special.__getitem__) | {KIND_KEY: "bytes"})
        definition = _byte_level(self._special).to_str(pretty=True)
        write_atomically(directory / HF_FILE, definition)


def byte_characters() -> list[str]:
    """The printable character by which byte-level models write each byte (Radford et al., 2019).

    A byte that is a printable Latin-1 character is written as itself, the others in order by the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _vocabulary(special_tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate([*special_tokens, *byte_characters()])}


def _byte_level(special_tokens: Sequence[str]) -> hf.Tokenizer:
    """The same tokenizer for Hugging Face's library: byte-pair encoding without a merge."""
    backend = hf.Tokenizer(models.BPE(_vocabulary(special_tokens), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    return backend
