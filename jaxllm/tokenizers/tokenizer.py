"""Tokenizers: text to token ids and back, whatever library does the work."""

import abc
import hashlib
import os
from pathlib import Path

import tokenizers as hf

from jaxllm.errors import UserError
from jaxllm.tokenizers.special_tokens import BOS, EOS, PAD, UNK

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Encoding adds no token of its own, neither at the start nor at the end, and reads the text of
    a special token, such as a literal `</s>`, as the characters it is made of: special tokens
    enter only by id, so no text can forge them.
    """

    vocab_size: int
    """Number of ids, special tokens included; every id is below it."""
    bos_id: int
    """Opens a document."""
    eos_id: int
    """Closes a document."""
    pad_id: int
    """Fills rows. Masks come from lengths, never from this value."""
    unk_id: int
    """What a tokenizer that is not lossless gives for text it cannot express."""
    fingerprint: str
    """Hexadecimal hash of everything that decides the encoding."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, computed on all cores."""

    @abc.abstractmethod
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` needs; a reader never sees half a file."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer run by Hugging Face `tokenizers`, kept as one `tokenizer.json`."""

    def __init__(self, backend: hf.Tokenizer):
        """Wraps `backend`.

        Raises:
            UserError: the vocabulary lacks one of `<s>`, `</s>`, `<pad>`, `<unk>`.
        """
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            self._special_id(token) for token in (BOS, EOS, PAD, UNK)
        )
        self.fingerprint = hashlib.blake2b(backend.to_str().encode(), digest_size=16).hexdigest()

    def _special_id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no token {token}, which marks documents here.")
        return index

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The "fast" variant leaves out character offsets, which nothing here reads.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = directory / f".{TOKENIZER_FILE}.{os.getpid()}"
        self._backend.save(str(unfinished))
        os.replace(unfinished, directory / TOKENIZER_FILE)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `directory`.

    Raises:
        UserError: there is no tokenizer in `directory`, or it cannot be read.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{directory}: there is no tokenizer here ({TOKENIZER_FILE} is missing).")
    try:
        backend = hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare `Exception`
        raise UserError(f"{path}: is not a readable tokenizer: {error}") from None
    try:
        return HuggingFaceTokenizer(backend)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
