"""Contamination: n-grams that items share with training text, and none that they do not."""

import json
import math
import random

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation import contamination
from jaxllm.evaluation.contamination import (
    ContaminationConfig,
    find_contamination,
    training_texts,
)

LETTERS = "a b c d e f g h i j k l m n o p q r s t".split()


def words(first, last):
    return " ".join(LETTERS[first:last])


def test_the_share_of_the_n_grams_and_the_first_are_told():
    items = {"task": ["x y z w v", words(0, 8)], "other": [words(2, 7)]}
    found = find_contamination(items, ["1 2", f"so {words(1, 6)} on"], n=4, min_words=4)
    assert found["task"].items == 2
    (overlap,) = found["task"].found
    assert overlap == (1, 2 / 5, "b c d e")
    assert found["other"].found == ((0, 1 / 2, "c d e f"),)
    assert found["task"].too_short == found["other"].too_short == ()


def test_case_and_punctuation_make_no_difference():
    found = find_contamination({"t": ["It's: A b_C!"]}, ["it s\n(a) 'B' c."], n=5, min_words=5)
    assert found["t"].found == ((0, 1.0, "it s a b c"),)


def test_of_chinese_each_character_is_a_word():
    items = {"t": ["床前明月光，疑是地上霜。"]}
    assert find_contamination(items, ["举头床前明月光疑是"], n=6)["t"].found[0].share == 2 / 5
    assert not find_contamination(items, ["床前 明月"], n=6)["t"].found


def test_an_n_gram_lies_within_one_text():
    parts = [words(0, 3), words(3, 6)]
    assert not find_contamination({"t": [words(0, 6)]}, parts, n=6, min_words=6)["t"].found
    assert find_contamination({"t": [words(0, 6)]}, [" ".join(parts)], 6, 6)["t"].found
    # Nor across two items.
    items = {"t": [words(0, 3), words(3, 6)]}
    assert not find_contamination(items, [words(1, 5)], n=3, min_words=3)["t"].found


def test_a_short_item_is_looked_for_as_a_whole():
    items = {"t": [words(0, 5), words(5, 9), words(9, 12), words(0, 5)]}
    found = find_contamination(items, [words(0, 20)], n=13, min_words=4)["t"]
    assert found.found == ((0, 1.0, "a b c d e"), (1, 1.0, "f g h i"), (3, 1.0, "a b c d e"))
    assert found.too_short == (2,)
    assert not find_contamination(items, [words(1, 8)], n=13, min_words=4)["t"].found


def test_nothing_is_found_where_there_is_nothing():
    assert find_contamination({}, ["a"]) == {}
    empty = find_contamination({"t": [""], "u": []}, ["a b"])
    assert (empty["t"].too_short, empty["u"].items) == ((0,), 0)
    assert not find_contamination({"t": [words(0, 13)]}, [])["t"].found
    assert not find_contamination({"t": [words(0, 13)]}, ["", "a"])["t"].found


def plainly(items, training, n, min_words):
    """The same by sets of tuples."""
    result = []
    for place, item in enumerate(items):
        own = item.split()
        length = min(n, len(own))
        grams = [tuple(own[i : i + length]) for i in range(len(own) - length + 1)]
        seen = {
            tuple(text.split()[i : i + length])
            for text in training
            for i in range(len(text.split()) - length + 1)
        }
        found = [gram for gram in grams if gram in seen]
        if length >= min_words and found:
            result.append((place, len(found) / len(grams), " ".join(found[0])))
    return tuple(result)


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_give_what_sets_give(seed, monkeypatch):
    monkeypatch.setattr(contamination, "_CHARACTERS_AT_ONCE", 50)
    draw = random.Random(seed)

    def text(longest):
        return " ".join(draw.choices("abc", k=draw.randint(0, longest)))

    items, training = [text(12) for _ in range(40)], [text(60) for _ in range(20)]
    found = find_contamination({"t": items}, training, n=6, min_words=3)["t"]
    assert found.found == plainly(items, training, 6, 3)
    assert found.found


def test_equal_hashes_of_other_words_do_not_count(monkeypatch):
    def all_alike(values, lengths):
        for length in lengths:
            yield length, np.zeros(max(0, len(values) - length + 1), np.uint64)

    monkeypatch.setattr(contamination, "_hashes", all_alike)
    items = {"t": [words(0, 4)]}
    assert not find_contamination(items, [words(4, 20), words(1, 4)], n=4, min_words=4)["t"].found
    assert find_contamination(items, [words(0, 20)], n=4, min_words=4)["t"].found


def test_training_text_is_read_from_records_of_any_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "two"}], "n": 3, "none": None},
        {"prompt": "three", "chosen": ["four"]},
    ]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([lines[0], "not JSON", *lines[1:]]) + "\n")
    texts = list(training_texts(ContaminationConfig(train=f"{path}@0.5"), 0.25))
    assert texts == ["one", "user", "two", "three", "four"]
    with pytest.raises(UserError, match=r"1 of the 4 lines .*=0\.2 allows; the first is .*l:2 \("):
        list(training_texts(ContaminationConfig(train=str(path)), 0.2))


def test_a_source_that_is_not_there_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"config\.contamination\.train: .* no such file"):
        training_texts(ContaminationConfig(train=str(tmp_path / "missing.jsonl")), 0.0)


@pytest.mark.parametrize("content", ["", '{"n": 3}\n', '{"text": " "}\n', "no JSON\n"])
def test_a_source_without_text_is_told(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl holds no text"):
        list(training_texts(ContaminationConfig(train=str(path)), 1.0))


def test_shares_are_of_the_items_that_were_looked_for():
    items = {"t": [words(0, 5), words(9, 12), words(5, 10)], "u": ["a"]}
    found = find_contamination(items, [words(0, 6)], n=13, min_words=4)
    judged, short = found["t"], found["u"]
    assert (judged.contaminated, judged.clean, judged.unchecked) == (1 / 2, [2], 1 / 3)
    assert math.isnan(short.contaminated) and (short.clean, short.unchecked) == ([], 1.0)


def test_options_are_checked():
    for name in ("ngram", "min_words"):
        with pytest.raises(ValueError, match=f"{name}: must be at least 1"):
            ContaminationConfig(**{name: 0})
