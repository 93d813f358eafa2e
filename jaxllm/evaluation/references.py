"""What classical methods reach on the same held-out text, in bits per byte.

A model's bits per byte mean something beside those of general compressors and of n-gram counts:

* `gzip`, `xz`: the held-out text alone, at the strongest plain level of each (`-9`);
* `xz_with_train`: xz may look back into the training text, as the model could;
* `unigram`, `bigram`: cross-entropy of token counts from the training tokens.
"""

import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt, UInt64

XZ_PRESET = 9
"""`xz -9`, without `--extreme`, which takes longer for about one part in a hundred."""

XZ_DICTIONARY_BYTES = 64 * 2**20
"""How far preset 9 looks back (xz manual, "-0 ... -9"): a longer prefix would change nothing."""

ABSOLUTE_DISCOUNT = 0.75
"""Taken off every bigram count; the value customary since Ney, Essen & Kneser 1994."""


def gzip_size(data: bytes) -> int:
    """Bytes of `data` after `gzip -9`."""
    return len(gzip.compress(data, compresslevel=9, mtime=0))


def xz_size(data: bytes) -> int:
    """Bytes of `data` after `xz -9`; the compressor takes up to 700 MB of memory."""
    return len(lzma.compress(data, preset=XZ_PRESET))


class NgramCounts(NamedTuple):
    """Counts of training tokens; a predicted token is any but the ignored one."""

    unigram: Float64[np.ndarray, "vocab"]
    """Add-one probability of each token; the ignored token has 0; the sum is 1."""
    keys: UInt64[np.ndarray, "pairs"]
    """Seen pairs, `previous * vocab + token`, ascending."""
    counts: Int64[np.ndarray, "pairs"]
    """How often each pair was seen."""
    context_counts: Int64[np.ndarray, "vocab"]
    """c(h): how often a predicted token followed h."""
    context_types: Int64[np.ndarray, "vocab"]
    """n(h): how many different tokens followed h."""


def ngram_counts(
    tokens: UInt[np.ndarray, "train"], vocab_size: int, ignore: int | None = None
) -> NgramCounts:
    """Counts unigrams and bigrams.

    Args:
        tokens: the training tokens in order.
        vocab_size: number of ids; every token is below it.
        ignore: an id that is never predicted (the one that opens a document), though it is
            a context like any other; None where there is none.
    """
    occurrences = np.bincount(tokens, minlength=vocab_size)
    unigram = occurrences + 1.0
    if ignore is not None:
        unigram[ignore] = 0.0
    unigram /= unigram.sum()

    predicted = _predicted(tokens[1:], ignore)
    keys, counts = np.unique(_pair_keys(tokens, vocab_size)[predicted], return_counts=True)
    contexts = (keys // np.uint64(vocab_size)).astype(np.int64)
    context_counts = np.bincount(contexts, weights=counts, minlength=vocab_size)
    context_types = np.bincount(contexts, minlength=vocab_size)
    return NgramCounts(unigram, keys, counts, context_counts.astype(np.int64), context_types)


def unigram_bits(
    model: NgramCounts, tokens: UInt[np.ndarray, "eval"], ignore: int | None = None
) -> float:
    """Bits that the add-one unigram spends on `tokens`, the ignored ones left out.

    p(w) = (c(w) + 1) / (number of tokens + number of predictable ids)
    """
    return _bits(model.unigram[tokens[_predicted(tokens, ignore)]])


def bigram_probabilities(
    model: NgramCounts, tokens: UInt[np.ndarray, "eval"]
) -> Float64[np.ndarray, "eval"]:
    """Probability of each token given the one before it; of the first, its unigram one.

    Absolute discounting, interpolated with the add-one unigram p(w), D = `ABSOLUTE_DISCOUNT`:

        p(w | h) = max(c(h, w) − D, 0) / c(h) + D · n(h) / c(h) · p(w)

    with c(h, w) the count of the pair, c(h) and n(h) as in `NgramCounts`; p(w) where c(h) is 0.
    (Ney, Essen & Kneser 1994; Chen & Goodman 1998, section 2.6.)
    """
    probabilities = model.unigram[tokens]
    if len(tokens) < 2 or not len(model.keys):
        return probabilities
    keys = _pair_keys(tokens, len(model.unigram))
    place = np.minimum(np.searchsorted(model.keys, keys), len(model.keys) - 1)
    pair_counts = np.where(model.keys[place] == keys, model.counts[place], 0)

    context = tokens[:-1]
    seen = model.context_counts[context] > 0
    total = np.maximum(model.context_counts[context], 1)
    discounted = np.maximum(pair_counts - ABSOLUTE_DISCOUNT, 0.0) / total
    freed = ABSOLUTE_DISCOUNT * model.context_types[context] / total
    smoothed = discounted + freed * probabilities[1:]
    probabilities[1:] = np.where(seen, smoothed, probabilities[1:])
    return probabilities


def bigram_bits(
    model: NgramCounts, tokens: UInt[np.ndarray, "eval"], ignore: int | None = None
) -> float:
    """Bits that the bigram of `bigram_probabilities` spends on the tokens not ignored."""
    return _bits(bigram_probabilities(model, tokens)[_predicted(tokens, ignore)])


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
        model = ngram_counts(train_tokens, vocab_size, ignore)
        bits = {
            "unigram": unigram_bits(model, eval_tokens, ignore),
            "bigram": bigram_bits(model, eval_tokens, ignore),
            "gzip": 8.0 * gzipped.result(),
            "xz": 8.0 * xz.result(),
            "xz_with_train": 8.0 * (both.result() - prefix_alone.result()),
        }
    return {
        f"reference/{name}/bits_per_byte": value / len(eval_text) for name, value in bits.items()
    }


def _pair_keys(tokens: UInt[np.ndarray, "length"], vocab_size: int) -> UInt64[np.ndarray, "pairs"]:
    return tokens[:-1].astype(np.uint64) * np.uint64(vocab_size) + tokens[1:]


def _predicted(
    tokens: UInt[np.ndarray, "length"], ignore: int | None
) -> Bool[np.ndarray, "length"]:
    return np.ones(len(tokens), bool) if ignore is None else tokens != ignore


def _bits(probabilities: Float64[np.ndarray, "length"]) -> float:
    return float(-np.log2(probabilities).sum())
