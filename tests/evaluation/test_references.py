"""References on held-out text: the compressors' sizes, and the names and order of the scores."""

import gzip
import lzma
import math
import random

import numpy as np
import pytest

from jaxllm.evaluation.references import gzip_size, reference_scores, xz_size


def tokens_of(*ids):
    return np.array(ids, dtype=np.uint16)


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
        for name in ("gzip", "xz", "xz_with_train", "unigram", "bigram", "kneser_ney")
    }
    # Having seen the words costs less than learning them on the way.
    assert scores["reference/xz_with_train/bits_per_byte"] < scores["reference/xz/bits_per_byte"]
    assert scores["reference/gzip/bits_per_byte"] == 8 * gzip_size(held_out) / len(held_out)
    assert scores["reference/xz/bits_per_byte"] == 8 * xz_size(held_out) / len(held_out)
    assert scores["reference/bigram/bits_per_byte"] < scores["reference/unigram/bits_per_byte"]
    # Five letters tell what word it is.
    kneser_ney = scores["reference/kneser_ney/bits_per_byte"]
    assert kneser_ney < 0.8 * scores["reference/bigram/bits_per_byte"]
    letters = np.bincount(as_tokens[1]) / len(held_out)
    entropy = -sum(share * math.log2(share) for share in letters if share)
    assert scores["reference/unigram/bits_per_byte"] == pytest.approx(entropy, rel=0.02)


def test_no_held_out_text_is_an_error():
    with pytest.raises(ValueError, match="held-out"):
        reference_scores(b"x", b"", tokens_of(1), tokens_of(), 4)
