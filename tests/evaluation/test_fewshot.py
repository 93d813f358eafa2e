"""Examples before a question: never the question itself, and the same for every model."""

import dataclasses

import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation.fewshot import choose_examples, with_examples
from jaxllm.evaluation.items import Item, Layout, kind_of

ITEMS = [Item(f"{n} + 1 =", f" {n + 1}", subject="odd" if n % 2 else "even") for n in range(30)]


def chosen(items=ITEMS, pool=ITEMS, count=3, seed=0):
    return choose_examples(items, pool, count, seed, "sums")


def test_examples_never_hold_the_item_nor_its_copy_nor_one_another():
    copies = [dataclasses.replace(item, line=7, answer=" else") for item in ITEMS[:5]]
    for item, examples in zip(ITEMS[:5], chosen(ITEMS[:5], ITEMS[:5] + copies, 4), strict=True):
        prompts = [example.prompt for example in examples]
        assert sorted([*prompts, item.prompt]) == sorted(item.prompt for item in ITEMS[:5])


def test_items_without_a_prompt_are_told_apart_by_their_options():
    items = [
        Item("", f"{n}!", ((f"{n}", "!"), ("x", "!")), choices=(f"{n}!", "x!")) for n in range(4)
    ]
    for item, examples in zip(items, chosen(items, items), strict=True):
        assert {*examples, item} == set(items)


CAPITALS = {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0}
SUN = {"context_options": ["It shone since A", "It shone since B"], "continuation": "was hot."}


@pytest.mark.parametrize("letters", [True, False])
@pytest.mark.parametrize(
    ("record", "turned"),
    [
        (CAPITALS, CAPITALS | {"choices": ["Rome", "Paris"], "answer": 1}),
        (SUN | {"gold": 0}, SUN | {"context_options": SUN["context_options"][::-1], "gold": 1}),
        (SUN | {"gold": 0}, SUN | {"gold": 1}),
    ],
)
def test_a_question_with_its_choices_in_another_order_is_the_same(record, turned, letters):
    items = [kind_of(r).parse(r, Layout(letters=letters)) for r in (record, turned)]
    with pytest.raises(UserError, match="there are only 0"):
        chosen(items, items, 1)


def test_other_choices_make_another_question():
    records = [CAPITALS, CAPITALS | {"choices": ["Paris", "Oslo"]}]
    items = [kind_of(r).parse(r, Layout()) for r in records]
    assert chosen(items, items, 1) == [(items[1],), (items[0],)]


def test_fewer_examples_are_the_first_of_more():
    assert [examples[:2] for examples in chosen(count=5)] == chosen(count=2)


def test_they_depend_on_the_seed_and_differ_from_item_to_item():
    assert chosen(seed=0) == chosen(seed=0) != chosen(seed=1)
    assert len(set(chosen())) > 20


def test_every_record_serves_as_an_example():
    items = [Item(str(n), " a") for n in range(200)]
    drawn = [e.prompt for examples in chosen(items, items[:10], count=2) for e in examples]
    assert set(drawn) == {str(n) for n in range(10)}
    assert max(map(drawn.count, set(drawn))) < 3 * len(drawn) / 10


def test_those_of_the_same_subject_come_first():
    for item, examples in zip(ITEMS, chosen(count=20), strict=True):
        assert [example.subject == item.subject for example in examples] == [True] * 14 + [
            False
        ] * 6
        assert len(set(examples)) == 20


def test_too_few_records_are_told():
    with pytest.raises(UserError, match=r"config.fewshot: 30 examples .* sums there are only 29"):
        chosen(count=30)
    assert chosen(count=0) == [()] * 30


def test_the_prompt_ends_in_the_question():
    item = Item("Q?\nA:", " 7", cue=" Let's think.")
    assert with_examples(item, ()) == "Q?\nA: Let's think."
    assert with_examples(item, ITEMS[:2]) == "0 + 1 = 1\n\n1 + 1 = 2\n\nQ?\nA:"
