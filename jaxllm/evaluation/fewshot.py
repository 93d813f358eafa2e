"""Examples before a question: which ones, and the prompt that they make (in-context learning,
Brown et al. 2020, https://arxiv.org/abs/2005.14165)."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence

from jaxllm.data.permutation import Permutation
from jaxllm.errors import UserError
from jaxllm.evaluation.items import Item

BETWEEN = "\n\n"
"""Stands between examples, and before the question."""


def choose_examples(
    items: Sequence[Item], pool: Sequence[Item], count: int, seed: int, task: str
) -> list[tuple[Item, ...]]:
    """`count` examples for each item, drawn from `pool`; never one that asks what the item does.

    Examples of the item's own subject come first, as far as there are any. Which are drawn
    depends on the seed, the task, the item's place among `items` and the pool alone, so every
    model sees the same; and the first k of them are those drawn if only k are asked for.

    Args:
        items: the questions.
        pool: where examples come from; may be the items themselves.
        count: how many for each.
        seed: of the draw.
        task: its name.

    Raises:
        UserError: the pool has too few others for an item.
    """
    by_subject = collections.defaultdict(list)
    for example in pool:
        by_subject[example.subject].append(example)
    chosen = []
    for number, item in enumerate(items):
        own = by_subject[item.subject]
        candidates = itertools.chain(
            _drawn(own, f"{seed} {task} {number}"),
            _drawn([] if len(own) == len(pool) else pool, f"{seed} {task} {number} others"),
        )
        examples = _first_others(item, candidates, count)
        if len(examples) < count:
            raise UserError(
                f"config.fewshot: {count} examples are asked for, and for a question of {task} "
                f"there are only {len(examples)}; ask for fewer, or name more in "
                "config.fewshot_source."
            )
        chosen.append(examples)
    return chosen


def parse_shots(text: str, field: str) -> tuple[int, ...]:
    """Numbers of examples, ascending, of `0,4`.

    Raises:
        ValueError: one is no whole number from 0; `field` is named.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{field}: is a list of whole numbers, as 5 or 0,1,2,4, and was {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def with_examples(item: Item, examples: Sequence[Item]) -> str:
    """What stands before the item's prompt, and its prompt."""
    shown = [example.text for example in examples]
    return BETWEEN.join([*shown, item.prompt + ("" if examples else item.cue)])


def _drawn(pool: Sequence[Item], key: str) -> Iterator[Item]:
    """The pool in the order of the key, drawn as far as it is asked for."""
    order = Permutation(len(pool), key) if pool else None
    return (pool[order(place)] for place in range(len(pool)) if order)


def _first_others(item: Item, candidates: Iterable[Item], count: int) -> tuple[Item, ...]:
    """The first `count` candidates that ask neither what the item does nor the same twice."""
    chosen: list[Item] = []
    for example in candidates:
        if len(chosen) == count:
            break
        if not any(_same_question(example, other) for other in (item, *chosen)):
            chosen.append(example)
    return tuple(chosen)


def _same_question(one: Item, other: Item) -> bool:
    """Whether one would give the other away: by its prompt or, since choices may stand in another
    order, by its words and choices. (Where contexts are the choices, they are all of it.)"""
    if one.prompt and one.prompt == other.prompt:
        return True
    same_words = one.content == other.content or not (one.prompt or other.prompt)
    return bool(one.choices) and same_words and sorted(one.choices) == sorted(other.choices)
