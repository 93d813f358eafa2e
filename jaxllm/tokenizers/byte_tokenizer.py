"""A tokenizer without a vocabulary to learn: a token for each byte of UTF-8."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.files import write_atomically
from jaxllm.tokenizers.interface import HF_FILE, SpecialIds, Tokenizer, write_config
from jaxllm.tokenizers.special_tokens import BOS, EOS, PAD, SPECIAL_TOKENS, UNK

KIND_KEY = "jaxllm_kind"
"""Entry of `tokenizer_config.json` by which a saved one is known again."""
_SPECIAL = re.compile("|".join(map(re.escape, sorted(SPECIAL_TOKENS, key=len, reverse=True))))


class ByteTokenizer(Tokenizer):
    """The special tokens, and after them one id for each of the 256 bytes, in order."""

    def __init__(self) -> None:
        self.vocab_size = len(SPECIAL_TOKENS) + 256
        bos, eos, pad, unk = (SPECIAL_TOKENS.index(token) for token in (BOS, EOS, PAD, UNK))
        self._set_special_ids(SpecialIds(bos, eos, pad, unk))
        identity = json.dumps(["bytes", SPECIAL_TOKENS])
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        if not parse_special_tokens:
            return self._bytes(text)
        ids, end = [], 0
        for match in _SPECIAL.finditer(text):
            ids += self._bytes(text[end : match.start()])
            ids.append(SPECIAL_TOKENS.index(match[0]))
            end = match.end()
        return ids + self._bytes(text[end:])

    def _bytes(self, text: str) -> list[int]:
        values = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return (values + len(SPECIAL_TOKENS)).tolist()

    def encode_batch(
        self, texts: Sequence[str], parse_special_tokens: bool = False, workers: int = 0
    ) -> list[list[int]]:
        # One core makes Python's integers as fast as several would.
        return [self.encode(text, parse_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        first = len(SPECIAL_TOKENS)
        text = bytearray()
        for index in ids:
            if first <= index < self.vocab_size:
                text.append(index - first)
            elif 0 <= index < first and not skip_special_tokens:
                text += SPECIAL_TOKENS[index].encode()
        return text.decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
        write_config(directory, tokens | {KIND_KEY: "bytes"})
        write_atomically(directory / HF_FILE, _byte_level().to_str(pretty=True))


def byte_characters() -> list[str]:
    """The printable character by which byte-level models write each byte (Radford et al., 2019).

    A byte that is a printable Latin-1 character is written as itself, the others in order by the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_level() -> hf.Tokenizer:
    """The same tokenizer for Hugging Face's library: byte-pair encoding without a merge."""
    tokens = [*SPECIAL_TOKENS, *byte_characters()]
    backend = hf.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend
