"""N-gram models of token ids: add-one unigram, absolute-discount bigram, modified Kneser-Ney."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt, UInt64

ABSOLUTE_DISCOUNT = 0.75
"""Taken off every bigram count; the value customary since Ney, Essen & Kneser 1994."""

MAX_TRAIN_TOKENS = 16_000_000
"""Kneser-Ney counts the last so many tokens, which bounds its memory."""

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""D1, D2, D3+ of an order too small to estimate them; `lmplz --discount_fallback` has the same."""


@dataclasses.dataclass(frozen=True)
class NgramCounts:
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


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """The n-grams of one length seen in training, and what follows the n-grams one shorter.

    The id of an n-gram is its place in `keys`; a context is the id of an n-gram one shorter, and 0
    is the empty one.
    """

    keys: Int64[np.ndarray, "ngrams"]
    """`context * ids + last token`, ascending, with ids as in `KneserNey`."""
    discounted: Float64[np.ndarray, "ngrams"]
    """(a − D(a)) / Σ a over the n-grams of the same context, with a the adjusted count."""
    backoff: Float64[np.ndarray, "contexts"]
    """γ: the share that a context leaves to the shorter one; 1 where nothing followed it."""


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """An interpolated modified Kneser-Ney model."""

    ids: int
    """Number of token ids, the opener among them."""
    opener: int
    """The id that opens every document; it is never predicted."""
    tables: tuple[NgramTable, ...]
    """One for each length of n-gram, from 1 to the order of the model."""


def fit_kneser_ney(
    tokens: UInt[np.ndarray, "train"], vocab_size: int, ignore: int | None = None, order: int = 5
) -> KneserNey:
    """Counts the n-grams up to `order` in the last `MAX_TRAIN_TOKENS` of `tokens`.

    The model is that of Chen & Goodman 1998, section 3: with a(h, w) the adjusted count of the
    n-gram of context h and token w, a(h) = Σ a(h, w), N_j(h) the number of tokens after h whose
    adjusted count is j (N_3: 3 or more), D as in `discounts`, and h′ the context without its
    first token,

        p(w | h) = max(a(h, w) − D(a(h, w)), 0) / a(h) + Σ_j D_j N_j(h) / a(h) · p(w | h′)

    or p(w | h′) where a(h) is 0, down to the uniform distribution of the ids that are predicted.
    The adjusted count is how often the n-gram occurs for those of the full order and those that
    begin with the opener, before which nothing can stand (Heafield et al. 2013, section 3.2), and
    how many different tokens come before it for the others. No n-gram reaches over the beginning
    of a document.

    Args:
        tokens: the training tokens in order; where the first opens no document, one begins there.
        vocab_size: number of ids; every token is below it.
        ignore: the id that opens a document, a context that is never predicted; None where there
            is none, and all tokens are one document.
        order: length of the longest n-grams, at least 1.

    Raises:
        ValueError: the order is below 1.
    """
    if order < 1:
        raise ValueError(f"the order of an n-gram model is at least 1, not {order}")
    opener = vocab_size if ignore is None else ignore
    ids = vocab_size + (ignore is None)
    words = _opened(tokens[-MAX_TRAIN_TOKENS:], opener)

    # `ending[i]` is the id of the n-gram that ends at i, or -1 where it would reach over the
    # beginning of a document. Of length 1 every token has one, seen or not.
    ending = words
    keys = np.arange(ids)
    counts = np.bincount(words, minlength=ids)
    counts[opener] = 0
    tables: list[NgramTable] = []
    contexts = 1
    for _ in range(order - 1):
        complete = 1 + np.flatnonzero((ending[:-1] >= 0) & (words[1:] != opener))
        longer_keys, first, longer, longer_counts = np.unique(
            ending[complete - 1] * ids + words[complete],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        # Each n-gram one longer is one more token before the n-gram that is its end.
        preceding = np.bincount(ending[complete[first]], minlength=len(keys))
        adjusted = np.where(preceding > 0, preceding, counts)
        tables.append(_ngram_table(keys, adjusted, contexts, ids))
        contexts, keys, counts = len(keys), longer_keys, longer_counts
        ending = np.full(len(words), -1)
        ending[complete] = longer
    tables.append(_ngram_table(keys, counts, contexts, ids))
    return KneserNey(ids, opener, tuple(tables))


def discounts(counts: Int64[np.ndarray, "ngrams"]) -> tuple[float, float, float]:
    """D1, D2 and D3+ of n-grams with these counts (Chen & Goodman 1998, section 3).

    With t_j the number of n-grams that have count j, and Y = t_1 / (t_1 + 2 t_2),

        D_j = j − (j + 1) Y t_{j+1} / t_j

    `FALLBACK_DISCOUNTS` where one of t_1 … t_4 is 0, or a D_j is not above 0.
    """
    one, two, three, four = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if not one * two * three * four:
        return FALLBACK_DISCOUNTS
    y = one / (one + 2 * two)
    estimated = (1 - 2 * y * two / one, 2 - 3 * y * three / two, 3 - 4 * y * four / three)
    return estimated if min(estimated) > 0 else FALLBACK_DISCOUNTS


def kneser_ney_probabilities(
    model: KneserNey, tokens: UInt[np.ndarray, "eval"]
) -> Float64[np.ndarray, "eval"]:
    """Probability of each token given those before it in its document; 0 of one that opens it.

    Where the first token opens no document, one begins there.
    """
    words = _opened(tokens, model.opener)
    probabilities = np.where(words == model.opener, 0.0, 1.0 / (model.ids - 1))
    contexts = np.zeros(len(words), np.int64)
    for table in model.tables:
        ngrams = _find(table.keys, contexts * model.ids + words)
        known = contexts >= 0
        probabilities[known] *= table.backoff[contexts[known]]
        probabilities[ngrams >= 0] += table.discounted[ngrams[ngrams >= 0]]
        contexts = np.append(-1, ngrams[:-1])
    return probabilities[len(words) - len(tokens) :]


def kneser_ney_bits(model: KneserNey, tokens: UInt[np.ndarray, "eval"]) -> float:
    """Bits that the model spends on the tokens, those that open a document left out."""
    return _bits(kneser_ney_probabilities(model, tokens)[tokens != model.opener])


def _opened(tokens: UInt[np.ndarray, "length"], opener: int) -> Int64[np.ndarray, "opened"]:
    """The tokens, with an opener before them unless they begin with one."""
    words = tokens.astype(np.int64)
    return words if len(words) and words[0] == opener else np.append(opener, words)


def _ngram_table(
    keys: Int64[np.ndarray, "ngrams"],
    adjusted: Int64[np.ndarray, "ngrams"],
    contexts: int,
    ids: int,
) -> NgramTable:
    """The table of n-grams with these adjusted counts; 0 is one that never occurred."""
    discount = np.array((0.0, *discounts(adjusted)))[np.minimum(adjusted, 3)]
    context = keys // ids
    total = np.bincount(context, weights=adjusted, minlength=contexts)
    freed = np.bincount(context, weights=discount, minlength=contexts)
    divisor = np.maximum(total, 1.0)
    backoff = np.where(total > 0, freed / divisor, 1.0)
    return NgramTable(keys, (adjusted - discount) / divisor[context], backoff)


def _find(
    keys: Int64[np.ndarray, "ngrams"], wanted: Int64[np.ndarray, "length"]
) -> Int64[np.ndarray, "length"]:
    """The place of each wanted key among the ascending ones, -1 where it is not there."""
    if not len(keys):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _pair_keys(tokens: UInt[np.ndarray, "length"], vocab_size: int) -> UInt64[np.ndarray, "pairs"]:
    return tokens[:-1].astype(np.uint64) * np.uint64(vocab_size) + tokens[1:]


def _predicted(
    tokens: UInt[np.ndarray, "length"], ignore: int | None
) -> Bool[np.ndarray, "length"]:
    return np.ones(len(tokens), bool) if ignore is None else tokens != ignore


def _bits(probabilities: Float64[np.ndarray, "length"]) -> float:
    return float(-np.log2(probabilities).sum())
