"""The Python documentation: present, of every kind, never imported."""

import ast
import sys

from jaxllm.data.pydocs import definitions, documents, module_page, without_docstrings


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


def test_definitions_are_of_public_modules():
    parts = {part for d in definitions() for part in d.path.split(".")}
    assert "pathlib" in parts
    assert not [part for part in parts if part.startswith("_")]


def test_no_answer_announces_what_is_cut_off():
    for definition in definitions():
        assert not definition.paragraph.endswith(":")
        assert not definition.answer.endswith(":")
        assert not definition.sentence.endswith(":")
