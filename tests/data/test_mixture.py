"""Mixtures: weights mean shares, limits hold, and row k is a function of k."""

import math
import random

import numpy as np
import pytest

from jaxllm.data.mixture import (
    Entry,
    MixedRows,
    PooledRows,
    mix,
    mixture_shares,
    parse_entries,
    rows_in_epochs,
)
from jaxllm.errors import UserError


def test_entries():
    assert parse_entries("a.jsonl, b/*.txt ,", "f") == [Entry("a.jsonl"), Entry("b/*.txt")]
    assert parse_entries("a@0.25,builtin:sorting:10k:3@3:2", "f") == [
        Entry("a", 0.25),
        Entry("builtin:sorting:10k:3", 3.0, 2.0),
    ]
    assert parse_entries("me@home.jsonl,s3://me@host/a.jsonl", "f") == [
        Entry("me@home.jsonl"),
        Entry("s3://me@host/a.jsonl"),
    ]
    assert parse_entries("me@2.jsonl@2,b@0", "f") == [Entry("me@2.jsonl", 2.0), Entry("b", 0.0)]
    assert parse_entries("notes@2024.txt", "f") == [Entry("notes@2024.txt")]
    assert parse_entries("a@1e-3,b@.5", "f") == [Entry("a", 0.001), Entry("b", 0.5)]
    assert parse_entries("", "f") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a@-1,b@2", r"config\.data\.train: a@-1: its weight must be .* not negative; was '-1'"),
        ("a@nan", "its weight"),
        ("a@inf", "its weight"),
        ("a@-1e3", "its weight"),
        ("a@1,b@2,a@3", "names a twice"),
        ("a@1:0", "its number of epochs must be positive"),
        ("a@1:-2", "its number of epochs"),
        ("a@1:two", "its number of epochs"),
        ("a@0,b@0", "its weights sum to 0"),
        ("a@1,b", "b has no weight and others have one"),
    ],
)
def test_wrong_entries_are_told(spec, message):
    with pytest.raises(UserError, match=message):
        parse_entries(spec, "data.train")


def test_the_mixture_of_gpt3():
    weights, tokens = [60.0, 22.0, 8.0, 8.0, 3.0], np.array([410e9, 19e9, 12e9, 55e9, 3e9])
    # The weights of the table sum to 101 per cent, and are taken by their proportion.
    shares = mixture_shares(weights)
    np.testing.assert_allclose(shares, np.array(weights) / 101)
    epochs = shares * 300e9 / tokens
    np.testing.assert_allclose(epochs, [0.435, 3.44, 1.98, 0.432, 2.97], rtol=3e-3)


def test_gpt3_drawn_row_by_row_in_billionths(numbered_rows):
    """The same table by the mixture itself, a row for a million tokens."""
    sizes = [410_000, 19_000, 12_000, 55_000, 3_000]
    names = ["Common Crawl", "WebText2", "Books1", "Books2", "Wikipedia"]
    entries = parse_entries(
        ",".join(f"{n}@{w}" for n, w in zip(names, (60, 22, 8, 8, 3), strict=True)), "data.train"
    )
    mixture = mix([numbered_rows(n, s) for s, n in enumerate(sizes)], entries, seed=0)
    epochs = mixture.drawn(300_000) / sizes
    np.testing.assert_allclose(epochs, [0.435, 3.44, 1.98, 0.432, 2.97], rtol=3e-3)


def test_shares():
    np.testing.assert_allclose(mixture_shares([1.0, 3.0]), [0.25, 0.75])
    np.testing.assert_allclose(mixture_shares([1.0, 9.0], temperature=2.0), [0.25, 0.75])
    np.testing.assert_allclose(mixture_shares([0.0, 9.0], temperature=5.0), [0, 1])
    np.testing.assert_allclose(mixture_shares([1.0, 1e12], temperature=1e6), [0.5, 0.5], atol=1e-4)


def taken(mixture, count):
    rows = [mixture[k]["row"].tolist() for k in range(count)]
    return [source for source, _ in rows], rows


@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.5, 0.5], [0.6, 0.22, 0.08, 0.07, 0.03], [1.0]])
def test_after_any_number_of_rows_every_source_is_near_its_share(numbered_rows, shares):
    sources = [numbered_rows(10 + 7 * s, s) for s in range(len(shares))]
    mixture = MixedRows(sources, np.array(shares), seed=0)
    drawn = np.array([mixture.drawn(n) for n in range(3000)])
    assert (drawn.sum(axis=1) == np.arange(3000)).all()
    error = np.abs(drawn - np.arange(3000)[:, None] * shares)
    assert error.max() < 0.5 + len(shares) / 2
    order, _ = taken(mixture, 400)
    counts = np.cumsum(np.array(order)[:, None] == np.arange(len(shares)), axis=0)
    np.testing.assert_array_equal(counts, drawn[1:401])


def test_shares_hold_over_the_end_of_a_period(numbered_rows):
    mixture = MixedRows([numbered_rows(5, s) for s in range(3)], np.array([0.5, 0.3, 0.2]), seed=0)
    for count in (65_535, 65_536, 65_537, 10**6, 10**12):
        assert np.abs(mixture.drawn(count) / count - [0.5, 0.3, 0.2]).max() < 3e-5
    before, after = mixture.drawn(65_536), mixture.drawn(65_537)
    source, place = mixture.place(65_536)
    assert (after - before)[source] == 1
    assert place == before[source]


def test_each_source_gives_its_rows_in_shuffled_epochs(numbered_rows):
    sizes = [7, 20, 3]
    mixture = MixedRows([numbered_rows(n, s) for s, n in enumerate(sizes)], np.full(3, 1 / 3), 1)
    _, rows = taken(mixture, 600)
    for source, size in enumerate(sizes):
        numbers = [row for s, row in rows if s == source]
        for begin in range(0, len(numbers) - size, size):
            assert sorted(numbers[begin : begin + size]) == list(range(size))


def test_an_exhausted_source_leaves_and_the_others_share_its_place(numbered_rows):
    sizes, epochs, shares = [10, 40, 100], [2.0, 1.5, math.inf], np.array([0.5, 0.3, 0.2])
    mixture = MixedRows([numbered_rows(n, s) for s, n in enumerate(sizes)], shares, 0, epochs)
    order, rows = taken(mixture, 600)
    assert mixture.drawn(600).tolist() == [20, 60, 520] == np.bincount(order).tolist()
    first = order.index(0, 30)
    last = max(k for k, source in enumerate(order) if source == 0)
    assert first < last < 45
    middle = np.bincount(order[last + 1 : last + 51], minlength=3)
    assert middle[0] == 0
    assert abs(middle[1] - 30) <= 1
    for source, size, seen in ((0, 10, 2), (1, 40, 1)):
        counts = np.bincount([row for s, row in rows if s == source], minlength=size)
        assert (counts >= seen).all()
        assert counts.max() <= math.ceil(epochs[source])


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_whose_sources_all_end_gives_each_row_as_often_as_its_epochs(numbered_rows, seed):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 40) for _ in range(4)]
    epochs = [float(rng.randint(1, 4)) for _ in range(4)]
    shares = mixture_shares([rng.random() for _ in range(4)])
    mixture = MixedRows([numbered_rows(n, s) for s, n in enumerate(sizes)], shares, seed, epochs)
    assert len(mixture) == sum(n * e for n, e in zip(sizes, epochs, strict=True))
    _, rows = taken(mixture, len(mixture))
    for source, (size, times) in enumerate(zip(sizes, epochs, strict=True)):
        counts = np.bincount([row for s, row in rows if s == source], minlength=size)
        assert (counts == times).all()
    assert mixture.drawn(len(mixture)).tolist() == [
        n * e for n, e in zip(sizes, epochs, strict=True)
    ]
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_epochs_are_rows_whatever_binary_fractions_make_of_them():
    assert rows_in_epochs(100, 0.29) == 29
    assert rows_in_epochs(7, 1.5) == 10
    assert rows_in_epochs(7, math.inf) > 10**18


def test_a_source_of_weight_zero_is_never_drawn(numbered_rows):
    mixture = MixedRows([numbered_rows(5, s) for s in range(2)], np.array([0.0, 1.0]), 0)
    assert set(taken(mixture, 50)[0]) == {1}


def test_many_sources_of_tiny_weight_each_come_to_their_turn(numbered_rows):
    shares = np.full(1000, 1e-9)
    shares[0] = 1 - shares[1:].sum()
    drawn = MixedRows([numbered_rows(5, s) for s in range(1000)], shares, 0).drawn(1 << 16)
    assert drawn.min() == 1
    assert drawn.sum() == 1 << 16


def test_without_weights_every_row_comes_once_an_epoch(numbered_rows):
    sources = [numbered_rows(n, s) for s, n in enumerate([5, 30, 1])]
    mixture = mix(sources, [Entry("a"), Entry("b"), Entry("c")], seed=0)
    assert isinstance(mixture, PooledRows)
    order, rows = taken(mixture, 72)
    for epoch in (rows[:36], rows[36:]):
        assert sorted(epoch) == [[s, n] for s, size in enumerate([5, 30, 1]) for n in range(size)]
    for count in (0, 36, 72):
        assert mixture.drawn(count).tolist() == np.bincount(order[:count], minlength=3).tolist()
    np.testing.assert_allclose(mixture.drawn(18), [2.5, 15, 0.5])
    limited = mix(sources, [Entry("a"), Entry("b"), Entry("c")], 0, max_epochs=1.5)
    assert len(limited) == 54
    with pytest.raises(IndexError):
        limited[54]


def test_what_a_configuration_asks_for(numbered_rows):
    sources = [numbered_rows(n, s) for s, n in enumerate([10, 90])]
    weighted = mix(sources, [Entry("a", 1.0), Entry("b", 1.0, 2.0)], 0, max_epochs=4.0)
    assert weighted.drawn(20).tolist() == [10, 10]
    assert len(weighted) == 10 * 4 + 90 * 2
    hot = mix(sources, [Entry("a"), Entry("b")], 0, temperature=2.0)
    assert hot.drawn(1000).tolist() == [250, 750]


def test_a_row_depends_on_its_number_alone(numbered_rows):
    def make():
        sources = [numbered_rows(n, s) for s, n in enumerate([10, 90])]
        return mix(sources, [Entry("a", 1.0, 3.0), Entry("b", 2.0)], seed=5)

    one, other = make(), make()
    forward = [one[k]["row"].tolist() for k in range(300)]
    assert forward == [other[k]["row"].tolist() for k in reversed(range(300))][::-1]
    assert make()[10**14]["row"].tolist() == one[10**14]["row"].tolist()
