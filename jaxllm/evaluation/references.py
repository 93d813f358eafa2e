"""What classical methods reach on the same held-out text, in bits per byte.

A model's bits per byte mean something beside those of general compressors and of n-gram counts:

* `gzip`, `xz`: the held-out text alone, at the strongest plain level of each (`-9`);
* `xz_with_train`: xz may look back into the training text, as the model could;
* `unigram`, `bigram`: cross-entropy of token counts from the training tokens;
* `kneser_ney`: the same of a 5-gram model, the strongest of the n-grams.
"""

import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt

from jaxllm.evaluation.ngrams import (
    bigram_bits,
    fit_kneser_ney,
    kneser_ney_bits,
    ngram_counts,
    unigram_bits,
)

XZ_PRESET = 9
"""`xz -9`, without `--extreme`, which takes longer for about one part in a hundred."""

XZ_DICTIONARY_BYTES = 64 * 2**20
"""How far preset 9 looks back (xz manual, "-0 ... -9"): a longer prefix would change nothing."""


def gzip_size(data: bytes) -> int:
    """Bytes of `data` after `gzip -9`."""
    return len(gzip.compress(data, compresslevel=9, mtime=0))


def xz_size(data: bytes) -> int:
    """Bytes of `data` after `xz -9`; the compressor takes up to 700 MB of memory."""
    return len(lzma.compress(data, preset=XZ_PRESET))


def reference_scores(
    train_text: bytes,
    eval_text: bytes,
    train_tokens: UInt[np.ndarray, "train"],
    eval_tokens: UInt[np.ndarray, "eval"],
    vocab_size: int,
    ignore: int | None = None,
) -> dict[str, float]:
    """Bits per byte of every reference, under the names of `summary.json`.

    xz takes about a second per MB and, on large data, 700 MB of memory for each of its three
    compressions, so they run in threads (`zlib` and `lzma` release the interpreter's lock) while
    the n-grams are counted, and of much data a sample should be passed. As prefix serves the end
    of `train_text`, as much as xz can look back to with the whole of `eval_text` read.

    Kneser-Ney counts the last `ngrams.MAX_TRAIN_TOKENS` of the training tokens, the other n-grams
    all of them; it takes about a second a million tokens, and 3 GB of memory at the most.

    Args:
        train_text, eval_text: UTF-8 bytes of the documents, without separators between them.
        train_tokens, eval_tokens: the same documents as token ids.
        vocab_size: number of token ids.
        ignore: the id that opens a document, which nobody has to predict; None if there is none.

    Raises:
        ValueError: there is no held-out text.
    """
    if not eval_text:
        raise ValueError("references need held-out text, and there is none")
    prefix = train_text[-max(XZ_DICTIONARY_BYTES - len(eval_text), 1) :]
    with ThreadPoolExecutor() as threads:
        both = threads.submit(xz_size, prefix + eval_text)
        prefix_alone = threads.submit(xz_size, prefix)
        xz = threads.submit(xz_size, eval_text)
        gzipped = threads.submit(gzip_size, eval_text)
        counts = ngram_counts(train_tokens, vocab_size, ignore)
        kneser_ney = fit_kneser_ney(train_tokens, vocab_size, ignore)
        bits = {
            "unigram": unigram_bits(counts, eval_tokens, ignore),
            "bigram": bigram_bits(counts, eval_tokens, ignore),
            "kneser_ney": kneser_ney_bits(kneser_ney, eval_tokens),
            "gzip": 8.0 * gzipped.result(),
            "xz": 8.0 * xz.result(),
            "xz_with_train": 8.0 * (both.result() - prefix_alone.result()),
        }
    return {
        f"reference/{name}/bits_per_byte": value / len(eval_text) for name, value in bits.items()
    }
