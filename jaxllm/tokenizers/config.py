"""Options of the tokenizer."""

import dataclasses

from jaxllm.tokenizers.trainers import TRAINERS

_LARGEST_VOCABULARY = 2**24  # trainers reserve memory for it, and abort the process if it fails


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train, or where one that exists lies."""

    kind: str = "bpe"
    """How to split text into tokens: `bpe` (byte-level byte-pair encoding), `wordpiece`, `unigram`,
    `charbpe`, `sentencepiece_bpe`, `sentencepiece_unigram` or `bytes`; docs/tokenizers.md compares
    them. Not used with `path`."""
    vocab_size: int = 8192
    """Number of tokens of a tokenizer that is trained, special tokens included."""
    train_bytes: int = 2**27
    """UTF-8 bytes of the training text to train on, about; of more text every so-many-th document
    is taken. The SentencePiece kinds need some 25 bytes of memory for each, `unigram` 35."""
    path: str = ""
    """Tokenizer to use as it is: a folder saved here or by Hugging Face, a `tokenizer.json`, a
    SentencePiece `.model`, GPT-2's `vocab.json` and `merges.txt`, or BERT's `vocab.txt`; empty:
    train one on the training text."""
    bos_token: str = ""
    """Token of the tokenizer at `path` that opens a document; empty: as its files say, else the
    first well-known name it has, else `eos_token`."""
    eos_token: str = ""
    """Token of the tokenizer at `path` that closes a document; empty: as its files say, else the
    first well-known name it has."""
    pad_token: str = ""
    """Token of the tokenizer at `path` that fills rows; empty: as its files say, else the first
    well-known name it has, else `eos_token`."""
    unk_token: str = ""
    """Token of the tokenizer at `path` for what it cannot express; empty: as its files say, else
    the first well-known name it has, else none."""
    mask_token: str = ""
    """Token of the tokenizer at `path` that stands where a masked word is to be filled in; empty:
    as its files say, else the first well-known name it has, else none."""

    def __post_init__(self) -> None:
        if self.kind not in TRAINERS:
            raise ValueError(f"kind: must be one of {', '.join(TRAINERS)}; was {self.kind!r}")
        for name in ("vocab_size", "train_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be positive; was {getattr(self, name)}")
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ValueError(
                f"vocab_size: must be at most {_LARGEST_VOCABULARY}; was {self.vocab_size}"
            )
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token"):
            if getattr(self, name) and not self.path:
                raise ValueError(
                    f"{name}: chooses a token of the tokenizer at path, and path is empty; one "
                    "that is trained has its own"
                )
