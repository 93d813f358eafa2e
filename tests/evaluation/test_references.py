"""Reference compressors and n-grams against answers that are known."""

import gzip
import lzma
import math
import random

import numpy as np
import pytest

from jaxllm.evaluation.references import (
    ABSOLUTE_DISCOUNT,
    bigram_bits,
    bigram_probabilities,
    gzip_size,
    ngram_counts,
    reference_scores,
    unigram_bits,
    xz_size,
)


def tokens_of(*ids):
    return np.array(ids, dtype=np.uint16)


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
def test_probabilities_sum_to_one_after_every_context(ignore):
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


def test_sizes_are_those_of_the_tools():
    text = b"the quick brown fox " * 500
    assert gzip.decompress(gzip.compress(text, 9)) == text
    assert gzip_size(text) == len(gzip.compress(text, 9))
    assert xz_size(text) == len(lzma.compress(text, preset=9))


def test_reference_scores_have_their_names_and_order():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=7)) for _ in range(400)]
    train = " ".join(generator.choices(words, k=20_000)).encode()
    held_out = " ".join(generator.choices(words, k=1_000)).encode()
    as_tokens = [
        np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in (train, held_out)
    ]
    scores = reference_scores(train, held_out, *as_tokens, vocab_size=256)
    assert set(scores) == {
        f"reference/{name}/bits_per_byte"
        for name in ("gzip", "xz", "xz_with_train", "unigram", "bigram")
    }
    # Having seen the words costs less than learning them on the way.
    assert scores["reference/xz_with_train/bits_per_byte"] < scores["reference/xz/bits_per_byte"]
    assert scores["reference/gzip/bits_per_byte"] == 8 * gzip_size(held_out) / len(held_out)
    assert scores["reference/xz/bits_per_byte"] == 8 * xz_size(held_out) / len(held_out)
    assert scores["reference/bigram/bits_per_byte"] < scores["reference/unigram/bits_per_byte"]
    letters = np.bincount(as_tokens[1]) / len(held_out)
    entropy = -sum(share * math.log2(share) for share in letters if share)
    assert scores["reference/unigram/bits_per_byte"] == pytest.approx(entropy, rel=0.02)


def test_no_held_out_text_is_an_error():
    with pytest.raises(ValueError, match="held-out"):
        reference_scores(b"x", b"", tokens_of(1), tokens_of(), 4)
