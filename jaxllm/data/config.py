"""Options of the data: where it comes from, and how it is cut into rows."""

import dataclasses

from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.packing import PACKINGS


@dataclasses.dataclass(frozen=True)
class SourcesConfig:
    """Where records come from, and what is held out."""

    train: str = "builtin:pydocs"
    """Sources of training text, `SOURCE[@weight[:epochs]]` separated by commas. A source is a path
    or glob, `tfds:NAME` or `builtin:NAME` (docs/data.md). Its weight is its share of rows, its
    epochs how often it may be read at most; without weights each row counts once."""
    temperature: float = 1.0
    """Weights are raised to the power 1/temperature: above 1, small sources get more."""
    max_epochs: float = 0.0
    """How often a source may be read that has no limit of its own; 0: as often as need be."""
    eval: str = ""
    """Sources of held-out text, without weights; empty: hold out a share of `train`."""
    eval_fraction: float = 0.05
    """Share of independent documents held out, by hash, when `eval` is empty."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of a source's lines is bad; bad ones are set aside."""
    parse_special_tokens: bool = True
    """Read each `<s>…</s>` span of a record as a document of its own; turn off for crawled text,
    where such marks are only characters."""
    cleaning: CleaningConfig = CleaningConfig()
    store: str = ""
    """Folder for what is made of the sources, to share between runs; empty: inside the work
    directory."""

    def __post_init__(self) -> None:
        if not self.train.strip(", "):
            raise ValueError("train: names no text; give some, as in --config.data.train=my.jsonl")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: must be between 0 and 1; was {self.eval_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: must be from 0 to 1; was {self.max_bad_fraction}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be positive; was {self.temperature}")
        if self.max_epochs < 0:
            raise ValueError(f"max_epochs: must not be negative; was {self.max_epochs}")


@dataclasses.dataclass(frozen=True)
class DataConfig(SourcesConfig):
    """Where text comes from, what is held out, and how it is cut into rows."""

    seq_len: int = 256
    """Tokens in a row."""
    packing: str = "concat"
    """How documents are laid into rows: `concat` (end to end, and cut), `best_fit` (whole, where
    they fit best), or `none` (each in a row of its own)."""
    document_mask: bool = True
    """Keep the documents of a row from attending to each other."""
    workers: int = 0
    """Threads that tokenise; 0: as many as there are cores. The result does not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len < 1:
            raise ValueError(f"seq_len: must be positive; was {self.seq_len}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing: must be one of {', '.join(PACKINGS)}; was {self.packing!r}")
        if self.workers < 0:
            raise ValueError(f"workers: must not be negative; was {self.workers}")
