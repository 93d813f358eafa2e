"""Options of the training data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from, what is held out, and how it is cut into rows."""

    train: str = "builtin:pydocs"
    """Sources of training text, separated by commas: a `.jsonl` or `.txt` path, a glob, or
    `builtin:NAME`."""
    eval: str = ""
    """Sources of held-out text, as for `train`; empty: hold out a share of `train`."""
    eval_fraction: float = 0.05
    """Share of independent documents held out, by hash, when `eval` is empty."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of a source's lines is bad; bad ones are set aside."""
    seq_len: int = 256
    """Tokens in a row."""
    document_mask: bool = True
    """Keep the documents of a row from attending to each other."""
    parse_special_tokens: bool = True
    """Read each `<s>…</s>` span of a record as a document of its own; turn off for crawled text,
    where such marks are only characters."""
    store: str = ""
    """Folder for tokenised text, to share between runs; empty: inside the work directory."""

    def __post_init__(self) -> None:
        if not self.train.strip(", "):
            raise ValueError("train: names no text; give some, as in --config.data.train=my.jsonl")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: must be between 0 and 1; was {self.eval_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: must be from 0 to 1; was {self.max_bad_fraction}")
        if self.seq_len < 1:
            raise ValueError(f"seq_len: must be positive; was {self.seq_len}")
