"""Labels asked of a language model: how the question is put, and what counts as an answer."""

import pytest

from jaxllm.data.labels import Labels
from jaxllm.evaluation.label_prompts import Labelled, asked_labels, label_items, way_scores
from jaxllm.evaluation.text_model import Written
from jaxllm.inference.scoring import LogLikelihood

NAMES = ("ham", "spam")
TEXTS = [Labelled("Win money", "spam"), Labelled("See you", "ham"), Labelled("你好", "ham")]


class Model:
    """Finds short labels likely, but for money spam; writes what it is given."""

    def __init__(self, written=(), room=1000):
        self.written = list(written)
        self.room = room
        self.asked = []

    def log_likelihoods(self, texts):
        self.asked += texts
        totals = [
            0.0 if "money" in context and "spam" in answer else -float(len(answer))
            for context, answer in texts
        ]
        left_out = [max(0, len(context) - self.room) for context, _ in texts]
        return [
            LogLikelihood(total, (total,), True, out)
            for total, out in zip(totals, left_out, strict=True)
        ]

    def write(self, prompts):
        self.asked += prompts
        return [
            Written(text, max(0, len(prompt) - self.room))
            for text, (prompt, _) in zip(self.written, prompts, strict=True)
        ]


def test_a_question_names_the_labels_in_its_language():
    english, _, chinese = label_items(TEXTS, NAMES)
    assert english.prompt == "Text: Win money\nLabel (ham, spam):"
    assert (english.answer, english.gold) == (" spam", 1)
    assert chinese.prompt == "文本：你好\n标签（ham、spam）："
    [number] = label_items([Labelled("x", 3)], (3, 4))
    assert number.answer == " 3"


def test_the_likeliest_label_is_chosen():
    model, items = Model(), label_items(TEXTS, NAMES)
    assert asked_labels(model, items, [], "likelihood", 0, 0).places == [1, 0, 0]
    assert model.asked[0] == ("Text: Win money\nLabel (ham, spam):", " ham")


def test_questions_that_lost_their_beginning_are_told():
    items = label_items(TEXTS, NAMES)
    model = Model(["", "", ""], room=len(items[0].prompt) - 1)
    assert asked_labels(model, items, [], "written", 0, 0).cut == pytest.approx(1 / 3)
    room = len(items[0].prompt)
    assert asked_labels(Model(room=room), items, [], "likelihood", 0, 0).cut == 0
    assert asked_labels(Model(room=room - 1), items, [], "likelihood", 0, 0).cut == pytest.approx(
        1 / 3
    )


def test_what_is_written_must_be_a_label():
    items = label_items(TEXTS, NAMES)
    model = Model([" spam", " ham spam", "Spam"])
    assert asked_labels(model, items, [], "written", 0, 0).places == [1, -1, -1]
    _, how = model.asked[0]
    assert (how.temperature, how.stop) == (0, ("\n",))


def test_examples_are_others_than_the_text():
    model, items = Model(), label_items(TEXTS, NAMES)
    asked_labels(model, items, items, "likelihood", 2, 0)
    context, _ = model.asked[0]
    assert context.count("Win money") == 1
    assert context.startswith(("Text: See you\nLabel (ham, spam): ham\n\n", "文本：你好"))


def test_scores_count_what_is_no_label_as_wrong():
    labels = Labels("single_label", NAMES, (2, 1), 3)
    scores = way_scores([1, -1, 1], label_items(TEXTS, NAMES), labels)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["macro_f1"] == pytest.approx((0 + 2 / 3) / 2)
    assert scores["texts"] == 3
