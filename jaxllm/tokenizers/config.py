"""Options of the tokenizer."""

import dataclasses

from jaxllm.tokenizers.trainers import TRAINERS


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train, or where a saved one lies."""

    kind: str = "bpe"
    """How to split text into tokens: `bpe` (byte-level byte-pair encoding)."""
    vocab_size: int = 8192
    """Number of tokens of a tokenizer that is trained, special tokens included."""
    path: str = ""
    """Folder of a saved tokenizer to use as it is; empty: train one on the training text."""

    def __post_init__(self) -> None:
        if self.kind not in TRAINERS:
            raise ValueError(f"kind: must be one of {', '.join(TRAINERS)}; was {self.kind!r}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: must be positive; was {self.vocab_size}")
