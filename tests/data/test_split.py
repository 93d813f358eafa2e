"""The held-out split: by group, stable, and with near-identical documents on one side."""

import collections
import dataclasses
import random

import numpy as np
import pytest

from jaxllm.data.cleaning import NO_CLEANING, CleaningConfig
from jaxllm.data.documents import Document
from jaxllm.data.split import DROPPED, HELD_OUT, TRAIN, divide, keep_apart
from jaxllm.errors import UserError

WORDS = [f"word{number}" for number in range(5000)]


def passage(seed, length=200):
    return random.Random(seed).choices(WORDS, k=length)


def document(words, group):
    return Document.of(" ".join(words), group)


COMPARED = dataclasses.replace(NO_CLEANING, near_duplicates=1.0)
"""Leaves out copies alone, and keeps what is similar on one side."""


def held_out(documents, fraction):
    """Which documents are held out."""
    return divide(documents, fraction, COMPARED, collections.Counter()) == HELD_OUT


def independent(count):
    return [document(passage(seed), f"g{seed}") for seed in range(count)]


def test_about_the_share_asked_for_is_held_out():
    sides = held_out(independent(1000), 0.2)
    assert 0.16 < sides.mean() < 0.24


def test_a_document_stays_on_its_side_whatever_else_there_is():
    documents = independent(300)
    sides = held_out(documents, 0.3)
    order = np.random.default_rng(0).permutation(300)[:200]
    np.testing.assert_array_equal(held_out([documents[i] for i in order], 0.3), sides[order])


def test_a_larger_share_holds_out_more_of_the_same():
    documents = independent(300)
    few, many = held_out(documents, 0.1), held_out(documents, 0.3)
    assert few.sum() < many.sum()
    assert not (few & ~many).any()


def test_a_group_is_on_one_side():
    documents = [document(passage(seed), f"g{seed % 40}") for seed in range(400)]
    sides = held_out(documents, 0.3)
    for group in range(40):
        assert len(set(sides[group::40])) == 1


@pytest.mark.parametrize("length", [100, 200, 3000])
def test_planted_near_copies_are_on_one_side(length):
    rng = random.Random(length)
    documents = []
    for seed in range(150):
        original = passage(seed, length)
        copy = list(original)
        for _ in range(length // 100):  # replaces 1 % of words, 5 shingles each: J ≈ 0.9
            copy[rng.randrange(length)] = rng.choice(WORDS)
        documents += [document(original, f"a{seed}"), document(copy, f"b{seed}")]
    rng.shuffle(documents)
    sides = {d.group: side for d, side in zip(documents, held_out(documents, 0.5), strict=True)}
    apart = sum(sides[f"a{seed}"] != sides[f"b{seed}"] for seed in range(150))
    assert apart == 0
    assert 30 < sum(sides.values()) < 270


def test_near_copies_of_text_written_without_spaces_are_found():
    rng = random.Random(0)
    documents = []
    for seed in range(100):
        characters = [chr(rng.randrange(0x4E00, 0x9000)) for _ in range(300)]
        documents.append(Document.of("".join(characters), f"a{seed}"))
        characters[150] = "改"
        documents.append(Document.of("".join(characters), f"b{seed}"))
    sides = held_out(documents, 0.5)
    # Of a pair in ten no place of the signatures differs, and the copy is left out.
    assert (sides[::2] >= sides[1::2]).all()
    assert (sides[::2] != sides[1::2]).sum() < 15
    assert 20 < sides[::2].sum() < 80


def test_unrelated_documents_are_not_joined():
    header = [f"licence{number}" for number in range(40)]  # a fifth of the text in common
    documents = [document([*header, *passage(seed)], f"g{seed}") for seed in range(400)]
    assert 0.4 < held_out(documents, 0.5).mean() < 0.6


def test_both_sides_get_something():
    for seed in range(20):
        documents = [document(passage(100 * seed + n), f"{seed}-{n}") for n in range(2)]
        for fraction in (0.001, 0.999):
            assert sorted(held_out(documents, fraction)) == [False, True]


def test_one_cluster_cannot_be_divided():
    with pytest.raises(UserError, match=r"config\.data\.eval"):
        held_out([document(passage(0), "a"), document(near_copy(passage(0), 0, 1), "b")], 0.5)


def near_copy(words, seed, replaced):
    rng = random.Random(seed)
    words = list(words)
    for place in rng.sample(range(len(words)), replaced):
        words[place] = rng.choice(WORDS)
    return words


def test_duplicates_are_left_out_and_counted():
    documents = independent(60)
    documents += documents[:7]
    documents += [document(near_copy(passage(seed), seed, 1), f"n{seed}") for seed in range(10, 15)]
    counts = collections.Counter()
    sides = divide(documents, 0.3, CleaningConfig(), counts)
    assert (sides[60:] == DROPPED).all()
    assert not (sides[:60] == DROPPED).any()
    assert counts == {"exact_duplicates": 7, "near_duplicates": 5}


def test_a_document_is_compared_with_those_that_were_kept():
    # Each of a chain resembles the one before it, but the last does not resemble the first.
    chain = [passage(0, 400)]
    for step in range(30):
        chain.append(near_copy(chain[-1], step, 4))
    sides = keep_apart(
        [],
        [document(w, f"c{n}") for n, w in enumerate(chain)],
        CleaningConfig(),
        collections.Counter(),
    )
    kept = np.flatnonzero(sides == TRAIN)
    assert kept[0] == 0
    assert 2 < len(kept) < 20


def test_training_text_that_is_held_out_is_left_out():
    held = independent(20)
    training = [
        *[document(passage(seed), f"t{seed}") for seed in range(100, 120)],
        document(passage(3), "copy"),
        document(near_copy(passage(4), 0, 1), "near copy"),
        document(passage(100), "copy in training"),
    ]
    counts = collections.Counter()
    sides = keep_apart(held, training, CleaningConfig(), counts)
    assert sides.tolist() == [HELD_OUT] * 20 + [TRAIN] * 20 + [DROPPED] * 3
    assert counts == {"held_out_duplicates": 2, "exact_duplicates": 1}
    sides = keep_apart(held, training, NO_CLEANING, counts)
    assert np.flatnonzero(sides == DROPPED).tolist() == [40]  # an exact copy, whatever is allowed


def test_without_comparing_groups_alone_stay_together():
    documents = [document(passage(seed), f"g{seed % 30}") for seed in range(200)]
    sides = divide(documents * 2, 0.4, NO_CLEANING, collections.Counter())
    assert DROPPED not in sides
    np.testing.assert_array_equal(sides[:200], sides[200:])
    for group in range(30):
        assert len(set(sides[:200][group::30])) == 1


def test_signs_count():
    pairs = [
        ("5 - 0 = 5", "5 + 0 = 5"),
        ("if (a < b) return x + y;", "if (a > b) return x - y;"),
        ("∀x∃y", "∃x∀y"),
        ("x += 1 while x == y", "x -= 1 while x != y"),
    ]
    documents = [Document.of(text) for pair in pairs for text in pair]
    sides = divide(documents, 0.5, CleaningConfig(), collections.Counter())
    assert DROPPED not in sides


def test_held_out_text_is_kept_whole():
    held = [document(passage(0), "a"), document(passage(0), "b")]
    sides = keep_apart(held, independent(5)[1:], CleaningConfig(), collections.Counter())
    assert sides.tolist() == [HELD_OUT] * 2 + [TRAIN] * 4
