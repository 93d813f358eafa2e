"""The Python documentation: present, of every kind, never imported; and the records made of it."""

import ast
import collections
import re
import sys

import pytest

from jaxllm.data.pydocs import (
    classifications,
    definitions,
    documents,
    instructions,
    module_page,
    preferences,
    without_docstrings,
)

MADE = [instructions, preferences, classifications]


def test_it_is_large_enough_to_learn_from_and_small_enough_for_a_laptop():
    texts = [fields["text"] for _, fields in documents()]
    assert 6e6 < sum(map(len, texts)) < 20e6
    assert all(text.strip() for text in texts)


def test_source_and_page_of_a_module_share_a_group():
    page, source = [f["text"] for group, f in documents() if group == "pydocs:module:bisect"]
    assert "def insort_right" in source
    assert page.startswith("bisect\n\nBisection algorithms.")
    assert "Insert item x in list a" in page


def test_tests_packages_and_tables_are_left_out():
    groups = {group for group, _ in documents()}
    assert "pydocs:module:json.decoder" in groups
    modules = [group.split(":")[-1].split(".") for group in groups]
    for unwanted in ("test", "encodings", "site-packages", "idlelib"):
        assert not any(unwanted in parts[:-1] for parts in modules)
    assert not any("_sysconfigdata" in group for group in groups)


def test_nothing_is_imported_to_read_it():
    assert documents()
    assert definitions()
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_a_module_page():
    tree = ast.parse(
        '"""What it is."""\n'
        "def bare(): pass\n"
        "async def f(a, *, b=1):\n    '''Does f.\n\n    More.\n    '''\n"
        "class C(Base):\n    def m(self):\n        '''Does m.'''\n"
    )
    assert module_page("m", tree) == (
        "m\n\nWhat it is.\n\nf(a, *, b=1)\n    Does f.\n\n    More.\n"
        "\nclass C(Base)\n\n    m(self)\n        Does m.\n"
    )


def test_docstrings_are_cut_out_of_a_source():
    source = '"""Page."""\nX = 1\ndef f():\n    """Does f."""\n    return X\n'
    assert without_docstrings(source, ast.parse(source)) == "X = 1\ndef f():\n    return X\n"


def test_a_definition_knows_its_question_signature_code_and_answer():
    (found,) = [d for d in definitions() if d.path == "bisect.insort_right"]
    assert found.question == "What does the Python function `bisect.insort_right` do?"
    assert found.signature.startswith("insort_right(a, x, lo=0, hi=None")
    assert found.code.startswith("def insort_right(")
    assert found.docstring not in found.code
    assert found.sentence == "Insert item x in list a, and keep it sorted assuming a is sorted."
    assert found.answer.startswith(found.sentence)


def test_no_two_definitions_share_a_name_or_an_answer():
    assert len({d.path for d in definitions()}) == len(definitions())
    assert len({d.answer for d in definitions()}) == len(definitions())


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


def test_a_preferred_answer_is_not_known_by_its_length():
    pairs = [(fields["chosen"], fields["rejected"]) for _, fields in preferences()]
    longer = sum(len(chosen) > len(rejected) for chosen, rejected in pairs) / len(pairs)
    assert 0.45 < longer < 0.6
    assert all(chosen != rejected for chosen, rejected in pairs)


def test_a_preferred_answer_is_not_known_without_the_question():
    own = {definition.question: definition.answer for definition in definitions()}
    kinds = collections.Counter()
    for _, fields in preferences():
        chosen, rejected = fields["chosen"], fields["rejected"]
        assert chosen == own[fields["prompt"]]
        if rejected in own.values():
            kinds["another"] += 1
        else:
            kinds["cut" if chosen.startswith(rejected) else "repeated"] += 1
    assert kinds["another"] > 0.5 * kinds.total()
    assert min(kinds.values()) > 0.1 * kinds.total()


def test_topics_are_about_equally_frequent():
    labels = collections.Counter(fields["label"] for _, fields in classifications())
    assert len(labels) == 8
    assert max(labels.values()) < 0.16 * labels.total()
    assert min(labels.values()) > 0.07 * labels.total()


def test_a_text_to_classify_does_not_name_its_package():
    for group, fields in classifications():
        package = group.split(":")[-1].split(".")[0].strip("_")
        assert not re.search(rf"\b{package}\b", fields["text"], re.IGNORECASE)
