"""Packing by plan: whole documents, every target once, and a plan that is made once."""

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data import packing
from jaxllm.data.packing import best_fit, cut_into_pieces, packed_rows

LENGTHS = [[2, 9, 30, 3, 3, 17, 8], [5, 40, 2, 2, 9]]


def documents(lengths):
    """The tokens of the documents of `make_store(*lengths)`."""
    bounds = np.cumsum([0, *itertools.chain(*lengths)])
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def segments(row):
    """Inputs and targets of each segment of a row."""
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        assert (row["positions"][here] == np.arange(here.sum())).all()
        assert (row["loss_weights"][here] == 1).all()
        yield row["tokens"][here].tolist(), row["targets"][here].tolist()


@pytest.mark.parametrize("method", ["best_fit", "none"])
@pytest.mark.parametrize("seq_len", [8, 16, 64])
def test_every_document_is_whole_unless_it_is_longer_than_a_row(make_store, method, seq_len):
    rows = packed_rows(make_store(*LENGTHS), method, seq_len)
    found = [part for k in range(len(rows)) for part in segments(rows[k])]
    for document in documents(LENGTHS):
        whole = [part for part in found if part == (document[:-1], document[1:])]
        if len(document) - 1 <= seq_len:
            assert len(whole) == 1
        else:  # pieces as long as rows, and the rest
            pieces = [part for part in found if part[0][0] in document]
            assert sorted(len(inputs) for inputs, _ in pieces)[1:] == [seq_len] * (len(pieces) - 1)
    targets = sorted(itertools.chain(*(targets for _, targets in found)))
    assert targets == sorted(itertools.chain(*(d[1:] for d in documents(LENGTHS))))
    assert all(targets[:-1] == inputs[1:] for inputs, targets in found)


@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_padding_is_nothing(make_store, method):
    rows = packed_rows(make_store(*LENGTHS), method, 16)
    filled = 0
    for k in range(len(rows)):
        row = rows[k]
        assert {name: array.shape for name, array in row.items()} == dict.fromkeys(row, (16,))
        padding = row["segment_ids"] == 0
        assert not any(array[padding].any() for array in row.values())
        filled += 16 - padding.sum()
    assert rows.fill_rate == pytest.approx(filled / (16 * len(rows)))


def test_rows_hold_one_document_each_without_packing(make_store):
    rows = packed_rows(make_store(*LENGTHS), "none", 64)
    assert len(rows) == 12
    firsts = [int(rows[k]["tokens"][0]) for k in range(12)]
    assert firsts == [document[0] for document in documents(LENGTHS)]


def test_without_a_document_mask_a_row_is_one_segment(make_store):
    store = make_store(*LENGTHS)
    masked, free = (packed_rows(store, "best_fit", 16, mask) for mask in (True, False))
    for k in range(len(masked)):
        filled = masked[k]["segment_ids"] > 0
        np.testing.assert_array_equal(free[k]["segment_ids"], filled)
        np.testing.assert_array_equal(free[k]["positions"][filled], np.arange(filled.sum()))
        np.testing.assert_array_equal(free[k]["tokens"], masked[k]["tokens"])


@settings(max_examples=300)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_places_every_piece_once_and_never_overfills(lengths):
    rows = best_fit(np.array(lengths, np.int64), 20)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    sums = [sum(lengths[piece] for piece in row) for row in rows]
    assert all(total <= 20 for total in sums)
    # No two rows could be one: the first piece of the later row would have fitted before.
    assert all(a + lengths[later[0]] > 20 for (a, later) in zip(sums, rows[1:], strict=False))
    # Decreasing best fit needs at most 11/9 of the fewest possible and one more.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) * 1.5 + 1


def test_best_fit_agrees_with_its_definition():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(40)]
        rooms, totals = [], []
        for length in sorted(lengths, reverse=True):
            fitting = [room for room in rooms if room >= length]
            if fitting:
                rooms.remove(min(fitting))
                rooms.append(min(fitting) - length)
            else:
                rooms.append(30 - length)
        rows = best_fit(np.array(lengths, np.int64), 30)
        totals = sorted(30 - sum(lengths[piece] for piece in row) for row in rows)
        assert totals == sorted(rooms)


def test_best_fit_fills_rows_that_documents_alone_leave_half_empty(make_store):
    lengths = np.random.default_rng(0).geometric(1 / 100, 2000) + 1
    store = make_store(lengths.tolist())
    assert packed_rows(store, "best_fit", 256).fill_rate > 0.99
    assert packed_rows(store, "none", 256).fill_rate < 0.5


def test_pieces_of_long_documents():
    pieces = cut_into_pieces(np.array([0, 2, 12, 17]), 4)
    assert pieces.tolist() == [[0, 1], [2, 4], [6, 4], [10, 1], [12, 4]]
    assert cut_into_pieces(np.array([0]), 4).shape == (0, 2)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_plan_is_made_once_and_again_when_the_store_is_another(make_store, monkeypatch):
    store = make_store(*LENGTHS)
    packed_rows(store, "best_fit", 16)
    made = files(store.path / "best_fit_16")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit", None)
        packed_rows(store, "best_fit", 16)
    (store.path / "best_fit_16" / "plan.json").write_text('{"fingerprint": "other"}')
    packed_rows(store, "best_fit", 16)
    assert files(store.path / "best_fit_16") == made


def test_a_plan_cut_off_at_any_moment_is_not_trusted(make_store, monkeypatch):
    whole = make_store(*LENGTHS)
    expected = packed_rows(whole, "best_fit", 16)
    for moment in range(1, 6):
        store = make_store(*LENGTHS)
        calls = itertools.count(1)

        def killed(write, *args, moment=moment, calls=calls):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return write(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for module, name in ((np, "save"), (os, "rename")):
                original = getattr(module, name)
                patch.setattr(module, name, lambda *a, original=original: killed(original, *a))
            packed_rows(store, "best_fit", 16)
        rows = packed_rows(store, "best_fit", 16)
        assert files(store.path / "best_fit_16") == files(whole.path / "best_fit_16")
        assert len(rows) == len(expected)
        assert not list(store.path.glob("*.unfinished"))


def test_a_damaged_plan_is_made_again(make_store):
    store = make_store(*LENGTHS)
    packed_rows(store, "best_fit", 16)
    made = files(store.path / "best_fit_16")
    path = store.path / "best_fit_16" / "pieces_00001.npy"
    path.write_bytes(path.read_bytes()[:-8])
    packed_rows(store, "best_fit", 16)
    assert files(store.path / "best_fit_16") == made


def test_two_that_plan_one_store_take_turns(make_store):
    store = make_store(np.random.default_rng(0).integers(2, 60, 20_000).tolist())
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(packed_rows, store, "best_fit", 64) for _ in range(4)]
        assert len({len(rows.result()) for rows in made}) == 1
    assert not list(store.path.glob("*.unfinished"))
