"""Which parameters are trained, and whether they are averaged."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is trained, whether it is averaged, and when a run that diverges ends."""

    trainable: str = ".*"
    """Pattern over the whole path of a parameter; the others stay as they are. With `lora.rank`,
    `.*` and `lora` are the low-rank pairs. Also `head` (the head that reads texts, alone) and
    `last:N` (the last N layers, and what follows them)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained parameters (0.999, say), kept in
    float32 beside them; 0: none. Step t, from 0, takes min(ema, (1+t)/(10+t)), so that the
    beginning is soon forgotten. Where there is an average, evaluation, samples and later stages
    (`init`) use it, in the dtype of `model.param_dtype`, and not the parameters themselves."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient may be non-finite (and which change nothing)."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"trainable: is no regular expression ({error})") from None
        if self.trainable.startswith("last:") and not self.last_layers:
            raise ValueError(
                "trainable: last:N is the last N layers, of which there is at least one, and was "
                f"given {self.trainable!r}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError("ema: must be in [0, 1)")
        if self.max_skipped < 0:
            raise ValueError("max_skipped: must not be negative")

    @property
    def last_layers(self) -> int:
        """N of `last:N`; 0 of another pattern."""
        match = re.fullmatch(r"last:(\d+)", self.trainable)
        return int(match[1]) if match else 0
