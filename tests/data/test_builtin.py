"""The Python documentation as a corpus: present, of both kinds, and never imported."""

import ast
import sys

import pytest

from jaxllm.data.builtin import builtin_source, module_page


@pytest.fixture(scope="module")
def documents():
    source = builtin_source("builtin:pydocs", "data.train")
    return [document for record in source.records() for document in record]


def test_it_is_large_enough_to_learn_from_and_small_enough_for_a_laptop(documents):
    assert 6e6 < sum(len(document.text) for document in documents) < 20e6
    assert all(document.text.strip() for document in documents)


def test_source_and_page_of_a_module_share_a_group(documents):
    page, source = [d.text for d in documents if d.group == "pydocs:module:bisect"]
    assert "def insort_right" in source
    assert page.startswith("bisect\n\nBisection algorithms.")
    assert "Insert item x in list a" in page


def test_tests_packages_and_tables_are_left_out(documents):
    groups = {document.group for document in documents}
    assert "pydocs:module:json.decoder" in groups
    modules = [group.split(":")[-1].split(".") for group in groups]
    for unwanted in ("test", "encodings", "site-packages", "idlelib"):
        assert not any(unwanted in parts[:-1] for parts in modules)
    assert not any("_sysconfigdata" in group for group in groups)


def test_nothing_is_imported_to_read_it(documents):
    assert documents
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_the_fingerprint_is_stable():
    source = builtin_source("builtin:pydocs", "data.train")
    assert source.fingerprint() == source.fingerprint()


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
