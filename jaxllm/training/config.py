"""Which parameters are trained."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is trained, and when a run that diverges ends."""

    trainable: str = ".*"
    """Pattern over the whole path of a parameter; the others stay as they are."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient may be non-finite (and which change nothing)."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"trainable: is no regular expression ({error})") from None
        if self.max_skipped < 0:
            raise ValueError("max_skipped: must not be negative")
