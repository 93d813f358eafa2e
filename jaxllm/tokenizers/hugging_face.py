"""Tokenizers run by Hugging Face `tokenizers`, each kept as one `tokenizer.json`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers as hf

from jaxllm.files import write_atomically
from jaxllm.tokenizers.added_tokens import AddedTokens, check_added_tokens
from jaxllm.tokenizers.byte_tokenizer import byte_characters
from jaxllm.tokenizers.interface import (
    HF_FILE,
    Tokenizer,
    available_cores,
    check_unicode,
    write_config,
)
from jaxllm.tokenizers.special_ids import Vocabulary, choose_special_ids
from jaxllm.tokenizers.special_tokens import is_marker


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer run by Hugging Face `tokenizers`."""

    def __init__(
        self,
        definition: str,
        asked: Mapping[str, str] | None = None,
        declared: Mapping[str, str] | None = None,
        added: AddedTokens = (),
    ):
        """Builds the tokenizer that `definition`, the text of a `tokenizer.json`, describes.

        Truncation, padding and dropout in it, which serve training elsewhere, are left out.

        Args:
            definition: the text of a `tokenizer.json`.
            asked: special tokens that the configuration names (`choose_special_ids`).
            declared: special tokens that files beside it name.
            added: tokens that files beside it add, the next ids of the vocabulary.

        Raises:
            ValueError: the library cannot read `definition`, or an added token gets another id.
            SpecialTokenError: the special tokens cannot be told.
        """
        try:
            content = json.loads(definition)
            content["truncation"] = content["padding"] = None
            if content["model"].get("dropout"):
                content["model"]["dropout"] = None
            # Two objects, because the library keeps as state whether special tokens are parsed.
            self._parsing = hf.Tokenizer.from_str(json.dumps(content))
            content = _with_added_tokens(self._parsing, content, added)
            content = _all_marks_special(content)
            self._plain = hf.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare `Exception`
            raise ValueError(str(error)) from None
        self._plain.encode_special_tokens = True
        check_added_tokens(added, self._parsing.token_to_id)
        vocabulary = self._parsing.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        special = choose_special_ids(
            Vocabulary(
                self._parsing.token_to_id,
                [token["content"] for token in content["added_tokens"]],
                _expresses_every_byte(content, vocabulary),
                _own_unk(content["model"]),
            ),
            asked or {},
            declared or {},
        )
        marks = [token["content"] for token in content["added_tokens"] if token["special"]]
        self._set_special_ids(special, [vocabulary[mark] for mark in marks])
        identity = f"{special}\n{self._parsing.to_str()}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        check_unicode([text])
        backend = self._parsing if parse_special_tokens else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self, texts: Sequence[str], parse_special_tokens: bool = False, workers: int = 0
    ) -> list[list[int]]:
        check_unicode(texts)
        backend = self._parsing if parse_special_tokens else self._plain

        # The "fast" variant leaves out character offsets, which nothing here reads.
        def encode(some: list[str]) -> list[list[int]]:
            return [e.ids for e in backend.encode_batch_fast(some, add_special_tokens=False)]

        if not 0 < workers < available_cores():
            return encode(list(texts))
        # The library's own threads are as many as there are cores. A call with one text keeps one
        # of them busy and lets go of Python's lock, so `workers` calls at a time use as many.
        with ThreadPoolExecutor(workers) as pool:
            return [ids for (ids,) in pool.map(encode, ([text] for text in texts))]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [index for index in ids if 0 <= index < self.vocab_size]
        return self._parsing.decode(known, skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        write_config(directory, self._settings(self._parsing.id_to_token))
        write_atomically(directory / HF_FILE, self._parsing.to_str(pretty=True))


def _with_added_tokens(
    backend: hf.Tokenizer, content: dict[str, Any], added: AddedTokens
) -> dict[str, Any]:
    """Adds to `backend` what it lacks, and gives `content`, its definition, as it is then."""
    known = {token["content"] for token in content["added_tokens"]}
    lacking = [token for _, token in added if token.content not in known]
    if not lacking:
        return content
    backend.add_tokens(lacking)
    return json.loads(backend.to_str())


def _all_marks_special(content: dict[str, Any]) -> dict[str, Any]:
    """The definition with every mark special, because only special tokens can be left unparsed."""
    marked = [
        token | {"special": token["special"] or is_marker(token["content"])}
        for token in content["added_tokens"]
    ]
    return content | {"added_tokens": marked}


def _expresses_every_byte(content: dict[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Whether the alphabet of byte-level models, or the bytes of SentencePiece's, is whole."""
    if content["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    byte_level = "ByteLevel" in json.dumps(content["pre_tokenizer"])
    return byte_level and all(c in vocabulary for c in byte_characters())


def _own_unk(model: dict[str, Any]) -> dict[str, str]:
    """What the model itself gives for text that it cannot express."""
    if model.get("unk_token"):
        return {"unk_token": model["unk_token"]}
    if model.get("unk_id") is not None:
        return {"unk_token": model["vocab"][model["unk_id"]][0]}
    return {}
