"""Classification without training: a language model is asked for the label of a text.

Two ways. `likelihood`: the label that the model finds the likeliest behind the question; `written`:
the one that it writes there, greedily. Each behind any number of labelled texts as examples.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.labels import Class, Labels
from jaxllm.evaluation.classification import class_scores, macro_f1
from jaxllm.evaluation.fewshot import choose_examples, with_examples
from jaxllm.evaluation.items import Item
from jaxllm.evaluation.measures import MEASURES
from jaxllm.evaluation.statistics import mean, standard_error
from jaxllm.evaluation.text_model import TextModel

_CHINESE = re.compile("[\u3400-\u9fff]")
_LEAST_NEW_TOKENS = 16

WAYS = {"likelihood": "choice", "written": "answer"}
"""Ways of asking, and the measure of each (`measures.MEASURES`)."""


class Labelled(NamedTuple):
    """A text and its class."""

    text: str
    label: Class


def label_items(texts: Sequence[Labelled], names: Sequence[Class]) -> list[Item]:
    """Questions after the labels of texts, in the language of each."""
    named = [str(name) for name in names]
    return [_item(text, str(label), named) for text, label in texts]


def _item(text: str, label: str, names: Sequence[str]) -> Item:
    if _CHINESE.search(text):
        prompt = f"文本：{text}\n标签（{'、'.join(names)}）："
    else:
        prompt = f"Text: {text}\nLabel ({', '.join(names)}):"
    return Item(
        prompt,
        f" {label}",
        options=tuple(("", f" {name}") for name in names),
        gold=names.index(label),
        target=label,
        stop=("\n",),
        choices=tuple(names),
        content=text,
    )


class Asked(NamedTuple):
    """What a model makes of questions after labels."""

    places: list[int]
    """Of the label that each text is given; -1 where none of them was written."""
    cut: float
    """Share of the questions that lost their beginning, since they did not fit with their
    examples."""


def asked_labels(
    model: TextModel,
    items: Sequence[Item],
    pool: Sequence[Item],
    way: str,
    shots: int,
    seed: int,
) -> Asked:
    """The labels that the model gives texts.

    Args:
        model: what is asked.
        items: of `label_items`, one at least.
        pool: where examples come from.
        way: of `WAYS`.
        shots: examples before each question.
        seed: of the choice of examples.

    Raises:
        UserError: there are too few examples.
    """
    examples = choose_examples(items, pool, shots, seed, "labels")
    prompts = [with_examples(item, shown) for item, shown in zip(items, examples, strict=True)]
    # A token is a byte at least.
    longest = max(len(name.encode()) for item in items for name in item.choices)
    outcomes = MEASURES[WAYS[way]](model, items, prompts, max(_LEAST_NEW_TOKENS, longest + 2))
    cut = mean([float(outcome.left_out > 0) for outcome in outcomes])
    if way == "likelihood":
        return Asked([int(outcome.details["chosen"]) for outcome in outcomes], cut)
    named = [" ".join(name.split()) for name in items[0].choices]
    written = (" ".join(outcome.details["response"].split()) for outcome in outcomes)
    return Asked([named.index(text) if text in named else -1 for text in written], cut)


def way_scores(chosen: Sequence[int], items: Sequence[Item], labels: Labels) -> dict[str, float]:
    """`accuracy` with its standard error, `macro_f1`, and the number of `texts`; what is none of
    the labels is wrong."""
    right = [float(place == item.gold) for place, item in zip(chosen, items, strict=True)]
    classes = len(labels.names)
    three = {name: np.zeros(classes) for name in ("right", "wrong", "missed")}
    for place, item in zip(chosen, items, strict=True):
        three["right"][item.gold] += place == item.gold
        three["missed"][item.gold] += place != item.gold
        if place not in (-1, item.gold):
            three["wrong"][place] += 1
    return {
        "accuracy": mean(right),
        "accuracy_stderr": standard_error(right),
        "macro_f1": macro_f1(class_scores(three, labels)),
        "texts": float(len(items)),
    }
