"""Documents cut in two: which tokens stand before the cut, and which behind it."""

import itertools

import numpy as np
import pytest

from jaxllm.data.continuations import FOLLOWED, first_answers, text_beginnings
from jaxllm.data.store import ShardCounts, TokenStore


@pytest.fixture
def stored(tmp_path_factory):
    """A store of documents, lists of ids, in shards; of conversations with what is learnt."""

    def make(shards, trained=()):
        path = tmp_path_factory.mktemp("store")

        def save(name, number, values, dtype):
            np.save(path / f"{name}_{number:05d}.npy", np.array(list(values), dtype))

        counts = []
        for number, documents in enumerate(shards):
            flat = list(itertools.chain.from_iterable(documents))
            save("tokens", number, flat, np.uint16)
            save("offsets", number, np.cumsum([0, *map(len, documents)]), np.int64)
            counts.append(ShardCounts(len(flat), len(documents), 0))
        for number, documents in enumerate(trained):
            save("trained", number, itertools.chain.from_iterable(documents), bool)
        return TokenStore(path, "", 100, "uint16", tuple(counts), masked=bool(trained))

    return make


def as_lists(beginnings):
    return [
        (list(each.ids), list(each.record[FOLLOWED]))
        for each in map(beginnings.__getitem__, range(len(beginnings)))
    ]


def test_text_is_cut_into_pieces_each_of_which_begins_with_a_prompt(stored):
    documents = [list(range(10, 21)), [1, 2], [3, 4, 5]]
    found = text_beginnings(stored([documents, [[7, 8, 9, 7]]]), longest=2, room=3)
    assert as_lists(found) == [
        ([10, 11], [12, 13, 14]),
        ([15, 16], [17, 18, 19]),  # and 20 alone begins nothing
        ([3, 4], [5]),
        ([7, 8], [9, 7]),
    ]
    assert found.dropped == 1


def test_every_token_of_a_long_document_is_in_one_piece(stored):
    for length in range(3, 40):
        found = as_lists(text_beginnings(stored([[list(range(length))]]), longest=4, room=5))
        joined = [token for pair in found for part in pair for token in part]
        assert joined == list(range(len(joined)))
        assert length - len(joined) <= 4
        assert all(len(prompt) == 4 and 1 <= len(followed) <= 5 for prompt, followed in found)


def test_a_conversation_is_cut_where_its_first_answer_begins(stored):
    documents = [
        [11, 12, 1, 21, 22, 2, 13, 1, 23, 2],  # two turns, the bos learnt
        [11, 12, 13, 14, 1, 21, 2],  # begins with too much
        [1, 31, 32, 33, 34, 35, 2],  # a text, all learnt but its bos
        [11, 12],  # nothing is learnt
    ]
    trained = [
        [0, 0, 1, 1, 1, 1, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0],
    ]
    found = first_answers(stored([documents], [trained]), longest=3, room=4, bos_id=1)
    assert as_lists(found) == [([11, 12, 1], [21, 22, 2]), ([1], [31, 32, 33, 34])]
    assert found.dropped == 2
    without = first_answers(stored([documents], [trained]), longest=3, room=4, bos_id=None)
    assert as_lists(without)[0] == ([11, 12], [1, 21, 22, 2])
