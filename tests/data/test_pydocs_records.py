"""Records made of the Python documentation: thousands, distinct, and not known by their looks."""

import collections
import re

import pytest

from jaxllm.data.pydocs import definitions, documents
from jaxllm.data.pydocs_records import classifications, instructions, preferences

MADE = [instructions, preferences, classifications]


@pytest.fixture(scope="module")
def pairs():
    """Prompt, kind of the rejected answer, chosen and rejected answer."""
    own = {definition.question: definition for definition in definitions()}
    answers = {definition.answer for definition in definitions()}
    made = []
    for _, fields in preferences():
        definition, rejected = own[fields["prompt"]], fields["rejected"]
        assert fields["chosen"] == definition.answer
        repeated = [" ".join([definition.sentence] * times) for times in (2, 3, 4)]
        kind = "another" if rejected in answers else "repeated" if rejected in repeated else "cut"
        made.append((definition, kind, fields["chosen"], rejected))
    return made


@pytest.mark.parametrize("make", MADE)
def test_there_are_thousands_and_none_is_empty_or_comes_twice(make):
    made = [fields for _, fields in make()]
    assert len(made) >= 2000
    for fields in made:
        assert all(text.strip() for name, text in fields.items() if name != "input")
    answers = ("output", "chosen", "rejected", "label")
    asked = {tuple(fields[name] for name in fields if name not in answers) for fields in made}
    assert len(asked) == len(made)


@pytest.mark.parametrize("make", MADE)
def test_records_of_a_module_stay_with_its_page(make):
    assert {group for group, _ in make()} <= {group for group, _ in documents()}


@pytest.mark.parametrize("make", MADE)
def test_the_first_records_are_of_many_modules(make):
    assert len({group for group, _ in make()[:100]}) > 30


def test_instructions_take_several_forms_and_answer_from_the_documentation():
    forms = collections.Counter()
    docstrings = " ".join(" ".join(d.docstring for d in definitions()).split())
    signatures = {d.signature for d in definitions()}
    for _, fields in instructions():
        forms[fields["instruction"].split("`")[0]] += 1
        output = " ".join(fields["output"].split())
        assert fields["output"] in signatures or output in docstrings
    assert len(forms) >= 6
    assert max(forms.values()) < 0.3 * forms.total()


def test_a_first_sentence_is_not_asked_for_where_it_is_given():
    for _, fields in instructions():
        if fields["instruction"].startswith("Write the first sentence"):
            assert fields["output"] not in " ".join(fields["input"].split())


def test_a_preferred_answer_is_not_known_by_its_length(pairs):
    longer = sum(len(chosen) > len(rejected) for _, _, chosen, rejected in pairs) / len(pairs)
    assert 0.45 < longer < 0.6


def test_a_preferred_answer_is_mostly_not_known_without_the_question(pairs):
    kinds = collections.Counter(kind for _, kind, _, _ in pairs)
    assert kinds["another"] > 0.5 * kinds.total()
    assert min(kinds.values()) > 0.1 * kinds.total()


def test_no_rejected_answer_is_right(pairs):
    sentences = {definition.answer: definition.sentence for definition in definitions()}
    for definition, kind, chosen, rejected in pairs:
        assert chosen != rejected
        if kind == "another":
            assert sentences[rejected] != definition.sentence
        if kind == "cut":
            assert chosen.startswith(rejected)
            assert re.search(r"[ \n][a-z]+$", rejected)  # no punctuation
            assert chosen[len(rejected)] in " \n"  # and no part of a word


def test_the_documentation_states_how_far_looks_alone_go(pairs):
    def looks(answer):
        words = answer.split()
        repeats = [words[: len(words) // n] * n == words for n in (2, 3, 4)]
        return not any(repeats), answer.endswith((".", "!", "?"))

    right = sum(
        (looks(chosen) > looks(rejected)) + (looks(chosen) == looks(rejected)) / 2
        for _, _, chosen, rejected in pairs
    )
    assert right / len(pairs) == pytest.approx(0.69, abs=0.02)


def test_topics_are_about_equally_frequent():
    labels = collections.Counter(fields["label"] for _, fields in classifications())
    assert len(labels) == 8
    assert max(labels.values()) < 0.16 * labels.total()
    assert min(labels.values()) > 0.06 * labels.total()


def test_a_text_to_classify_does_not_name_its_package():
    for group, fields in classifications():
        package = group.split(":")[-1].split(".")[0]
        assert not re.search(rf"\b{package}\b", fields["text"], re.IGNORECASE)
