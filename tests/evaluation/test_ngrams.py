"""N-grams against answers that are known, and Kneser-Ney against a slow one of dictionaries."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.evaluation import ngrams
from jaxllm.evaluation.ngrams import (
    ABSOLUTE_DISCOUNT,
    FALLBACK_DISCOUNTS,
    bigram_bits,
    bigram_probabilities,
    discounts,
    fit_kneser_ney,
    kneser_ney_bits,
    kneser_ney_probabilities,
    ngram_counts,
    unigram_bits,
)

OPENER = 0


def tokens_of(*ids):
    return np.array(ids, dtype=np.uint16)


def joined(documents):
    return tokens_of(*(token for document in documents for token in (OPENER, *document)))


def random_documents(seed, number, vocab, longest=40):
    """Documents of tokens whose shares fall off as in text."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, number)
    return [(1 + rng.zipf(1.5, length) % (vocab - 1)).tolist() for length in lengths]


class SlowKneserNey:
    """The formulas of Chen & Goodman read aloud: a dictionary for each length, no arrays."""

    def __init__(self, documents, vocab_size, order):
        self.predicted = vocab_size - 1
        self.order = order
        occurrences = Counter()
        for document in documents:
            opened = (OPENER, *document)
            for end in range(1, len(opened)):
                for length in range(1, min(order, end + 1) + 1):
                    occurrences[opened[end - length + 1 : end + 1]] += 1
        before = {}
        for ngram in occurrences:
            before.setdefault(ngram[1:], set()).add(ngram[0])
        self.adjusted = {
            ngram: count if len(ngram) == order or ngram[0] == OPENER else len(before[ngram])
            for ngram, count in occurrences.items()
        }
        self.after = {}
        for ngram in self.adjusted:
            self.after.setdefault(ngram[:-1], []).append(ngram)
        self.discounts = {length: self.estimate(length) for length in range(1, order + 1)}

    def estimate(self, length):
        sizes = Counter(count for ngram, count in self.adjusted.items() if len(ngram) == length)
        if not all(sizes[count] for count in (1, 2, 3, 4)):
            return FALLBACK_DISCOUNTS
        y = sizes[1] / (sizes[1] + 2 * sizes[2])
        estimate = tuple(j - (j + 1) * y * sizes[j + 1] / sizes[j] for j in (1, 2, 3))
        return FALLBACK_DISCOUNTS if any(value <= 0 for value in estimate) else estimate

    def discount(self, ngram):
        return self.discounts[len(ngram)][min(self.adjusted[ngram], 3) - 1]

    def probability(self, context, token):
        """Of the token after the whole context."""
        shorter = self.probability(context[1:], token) if context else 1 / self.predicted
        followers = self.after.get(context, [])
        if not followers:
            return shorter
        total = sum(self.adjusted[ngram] for ngram in followers)
        ngram = (*context, token)
        kept = self.adjusted[ngram] - self.discount(ngram) if ngram in self.adjusted else 0.0
        freed = sum(self.discount(ngram) for ngram in followers)
        return kept / total + freed / total * shorter

    def probabilities(self, documents):
        result = []
        for document in documents:
            opened = (OPENER, *document)
            result.append(0.0)
            for end in range(1, len(opened)):
                context = opened[max(0, end - self.order + 1) : end]
                result.append(self.probability(context, opened[end]))
        return result


def test_uniform_tokens_cost_log2_of_the_vocabulary():
    tokens = np.tile(np.arange(64, dtype=np.uint16), 100)
    model = ngram_counts(tokens, 64)
    assert unigram_bits(model, tokens) / len(tokens) == pytest.approx(6.0)


def test_the_ignored_id_neither_costs_nor_takes_probability():
    tokens = np.tile(tokens_of(4, 0, 1, 2, 3), 50)
    model = ngram_counts(tokens, 5, ignore=4)
    assert model.unigram[4] == 0
    assert unigram_bits(model, tokens, ignore=4) == pytest.approx(200 * 2.0)


def test_a_deterministic_cycle_costs_the_bigram_next_to_nothing():
    cycle = np.tile(np.arange(16, dtype=np.uint32), 2000)
    model = ngram_counts(cycle, 16)
    assert bigram_bits(model, cycle) / len(cycle) < 0.01
    assert unigram_bits(model, cycle) / len(cycle) == pytest.approx(4.0)


@pytest.mark.parametrize("ignore", [None, 2])
def test_bigram_probabilities_sum_to_one_after_every_context(ignore):
    vocab = 7
    train = np.random.default_rng(0).integers(0, 6, 200).astype(np.uint16)  # 6 never seen
    model = ngram_counts(train, vocab, ignore)
    assert model.unigram.sum() == pytest.approx(1.0)
    for context in range(vocab):
        total = sum(
            bigram_probabilities(model, tokens_of(context, word))[1] for word in range(vocab)
        )
        assert total == pytest.approx(1.0)


def test_bigram_formula_by_hand():
    model = ngram_counts(tokens_of(0, 1, 0, 1, 0, 2), 3)
    unigram = [4 / 9, 3 / 9, 2 / 9]
    after_0 = bigram_probabilities(model, tokens_of(0, 1))
    # 0 is followed three times, by two different tokens; by 1 twice.
    assert after_0[0] == pytest.approx(unigram[0])
    expected = (2 - ABSOLUTE_DISCOUNT) / 3 + ABSOLUTE_DISCOUNT * 2 / 3 * unigram[1]
    assert after_0[1] == pytest.approx(expected)
    # Nothing ever followed 2.
    assert bigram_probabilities(model, tokens_of(2, 0))[1] == pytest.approx(unigram[0])


def test_large_vocabularies_do_not_mix_up_pairs():
    vocab = 200_000
    train = np.tile(np.array([vocab - 1, vocab - 2, 5], dtype=np.uint32), 500)
    model = ngram_counts(train, vocab)
    assert bigram_bits(model, train) / len(train) < 0.2


def test_nothing_to_learn_from_leaves_the_uniform_distribution():
    model = ngram_counts(tokens_of(), 8)
    assert bigram_bits(model, tokens_of(1, 2, 3)) == pytest.approx(3 * 3.0)


few_documents = st.lists(st.lists(st.integers(1, 5), max_size=9), max_size=6)


@given(few_documents, few_documents, st.integers(1, 5))
@settings(max_examples=60)
def test_kneser_ney_is_that_of_dictionaries_on_few_tokens(train, held_out, order):
    slow = SlowKneserNey(train, 7, order)
    model = fit_kneser_ney(joined(train), 7, OPENER, order)
    found = kneser_ney_probabilities(model, joined(held_out))
    np.testing.assert_allclose(found, slow.probabilities(held_out), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_that_of_dictionaries_where_discounts_are_estimated(order):
    vocab = 300
    train = random_documents(1, 150, vocab - 2)  # the last two ids are never seen
    held_out = [*random_documents(2, 20, vocab), *train[:3], [vocab - 1, vocab - 2]]
    slow = SlowKneserNey(train, vocab, order)
    assert slow.discounts[order] != FALLBACK_DISCOUNTS
    model = fit_kneser_ney(joined(train), vocab, OPENER, order)
    found = kneser_ney_probabilities(model, joined(held_out))
    np.testing.assert_allclose(found, slow.probabilities(held_out), rtol=1e-12)


def test_kneser_ney_formula_by_hand():
    model = fit_kneser_ney(joined([[1, 2, 1, 2, 3]]), 4, OPENER, order=2)
    # Too few n-grams to estimate discounts from: they are 0.5, 1 and 1.5.
    # 1 comes after two different tokens (0 and 2), 2 and 3 after one; three ids are predicted.
    one = (2 - 1) / 4 + (1 + 0.5 + 0.5) / 4 / 3
    two = three = (1 - 0.5) / 4 + (1 + 0.5 + 0.5) / 4 / 3
    assert one + two + three == pytest.approx(1)
    found = kneser_ney_probabilities(model, joined([[1, 2, 3, 2]]))
    expected = [
        0.0,
        (1 - 0.5) / 1 + 0.5 / 1 * one,  # 0 is followed once, by 1
        (2 - 1) / 2 + 1 / 2 * two,  # 1 twice, by 2
        (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * three,  # 2 twice, by 1 and by 3
        two,  # nothing ever followed 3
    ]
    assert found == pytest.approx(expected)


def test_discounts_by_hand_and_where_they_cannot_be_estimated():
    def of(*sizes):
        return discounts(np.repeat(np.arange(len(sizes)), sizes))

    assert of(9, 10, 5, 2, 1, 7) == pytest.approx((0.5, 1.4, 2.0))  # Y is 1/2
    for fallback in [(9, 10, 5, 2, 0), (9, 0, 5, 2, 1), (9, 2, 1, 100, 1), (9,), ()]:
        assert of(*fallback) == FALLBACK_DISCOUNTS


@pytest.mark.parametrize("ignore", [None, OPENER])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_kneser_ney_probabilities_sum_to_one_after_every_context(order, ignore):
    vocab = 24
    train = joined(random_documents(3, 60, vocab - 1))  # the last id is never seen
    model = fit_kneser_ney(train, vocab, ignore, order)
    seen = [train[end - 6 : end].tolist() for end in range(6, 400, 20)]
    unseen = np.random.default_rng(4).integers(1, vocab, (20, 6)).tolist()
    # Short ones stand at the beginning of a document.
    for context in [*seen, *unseen, [], [1], [1, 2], [vocab - 1], [OPENER], [OPENER, 1]]:
        after = [
            kneser_ney_probabilities(model, tokens_of(*context, token))[-1]
            for token in range(vocab)
        ]
        assert sum(after) == pytest.approx(1, abs=1e-9)
        assert min(after[1:]) > 0
        assert (after[OPENER] == 0) == (ignore is not None)


def test_repeated_phrases_cost_kneser_ney_less_than_the_bigram():
    rng = np.random.default_rng(5)
    phrases = rng.integers(1, 30, (100, 12))
    train, held_out = (
        np.insert(phrases[rng.integers(0, 100, number)], 0, OPENER, axis=1).ravel()
        for number in (600, 60)
    )
    train, held_out = train.astype(np.uint16), held_out.astype(np.uint16)
    kneser_ney = kneser_ney_bits(fit_kneser_ney(train, 30, OPENER), held_out)
    bigram = bigram_bits(ngram_counts(train, 30, OPENER), held_out, OPENER)
    assert kneser_ney < 0.4 * bigram


@pytest.mark.parametrize("ignore", [None, OPENER])
@pytest.mark.parametrize("train", [[], [OPENER], [3]])
def test_next_to_nothing_to_learn_from_leaves_kneser_ney_near_uniform(train, ignore):
    model = fit_kneser_ney(tokens_of(*train), 9, ignore)
    found = kneser_ney_probabilities(model, tokens_of(5, 6))
    if 3 in train:
        assert (found > 0).all()
    elif ignore is None and train:
        assert found.sum() < 2 / 9  # to have begun with 0 makes 0 likelier
    else:
        assert found == pytest.approx(1 / (9 - (ignore is not None)))
    assert len(kneser_ney_probabilities(model, tokens_of())) == 0
    assert kneser_ney_bits(model, tokens_of()) == 0


def test_kneser_ney_without_an_opener_takes_all_tokens_for_one_document():
    documents = random_documents(6, 30, 12)
    tokens = joined([[token for document in documents for token in document]])
    alone = fit_kneser_ney(tokens[1:] - 1, 11)
    opened = fit_kneser_ney(tokens, 12, OPENER)
    assert kneser_ney_bits(alone, tokens[1:] - 1) == pytest.approx(kneser_ney_bits(opened, tokens))


def test_large_vocabularies_do_not_mix_up_kneser_ney():
    vocab = 200_000
    cycle = np.tile(np.array([vocab - 1, vocab - 2, 5, vocab - 1, 7], dtype=np.uint32), 500)
    model = fit_kneser_ney(cycle, vocab)
    assert kneser_ney_bits(model, cycle) / len(cycle) < 0.05


def test_kneser_ney_counts_the_last_tokens_where_there_are_too_many(monkeypatch):
    tokens = joined(random_documents(7, 40, 12))
    expected = kneser_ney_bits(fit_kneser_ney(tokens[-100:], 12, OPENER), tokens)
    assert kneser_ney_bits(fit_kneser_ney(tokens, 12, OPENER), tokens) != pytest.approx(expected)
    monkeypatch.setattr(ngrams, "MAX_TRAIN_TOKENS", 100)
    assert kneser_ney_bits(fit_kneser_ney(tokens, 12, OPENER), tokens) == pytest.approx(expected)


def test_an_order_below_one_is_an_error():
    with pytest.raises(ValueError, match="order"):
        fit_kneser_ney(tokens_of(1), 4, order=0)
