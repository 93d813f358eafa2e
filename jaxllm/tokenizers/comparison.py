"""Measures a tokenizer on text, to choose between several."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

from jaxllm.tokenizers.interface import Tokenizer

_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a tokenizer makes of some texts."""

    vocab_size: int
    bytes_per_token: float
    """UTF-8 bytes of the texts for each token: higher is shorter sequences."""
    unknown_rate: float
    """Share of the tokens that stand for text the tokenizer cannot express."""
    lossless: float
    """Share of the texts that come back exactly."""
    megabytes_per_second: float
    """Encoding speed in 10⁶ UTF-8 bytes, the median of a few repeats."""


def measure(tokenizer: Tokenizer, texts: Sequence[str], workers: int = 0) -> Measurement:
    """Encodes and decodes `texts` on at most `workers` cores (0: all); prints nothing.

    Raises:
        ValueError: the texts hold no character.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes == 0:
        raise ValueError("there is no text to measure on")
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(texts, workers=workers)
        seconds.append(time.perf_counter() - start)
    tokens = sum(map(len, encoded))
    unknown = 0 if tokenizer.unk_id is None else sum(ids.count(tokenizer.unk_id) for ids in encoded)
    same = sum(
        tokenizer.decode(ids, skip_special_tokens=False) == text
        for ids, text in zip(encoded, texts, strict=True)
    )
    return Measurement(
        vocab_size=tokenizer.vocab_size,
        # White space alone may make no token at all.
        bytes_per_token=num_bytes / tokens if tokens else 0.0,
        unknown_rate=unknown / tokens if tokens else 0.0,
        lossless=same / len(texts),
        megabytes_per_second=num_bytes / 1e6 / statistics.median(seconds),
    )
