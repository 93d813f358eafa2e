"""Functions of the user's own: found on the path and in the current directory; mistakes told."""

import re
import sys

import pytest

from jaxllm.errors import UserError
from jaxllm.rewards.own_function import load_function


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current directory; path and modules as they were when the test is over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def message(module, name="politeness"):
    with pytest.raises(UserError) as told:
        load_function(module, name)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_module_of_the_current_directory_is_found(here):
    (here / "my_rewards_a.py").write_text("def politeness(p, r, records):\n    return [1.0]\n")
    assert load_function("my_rewards_a", "politeness")([], [], []) == [1.0]


def test_a_module_of_a_package_and_what_it_imports_when_called(here):
    (here / "my_rewards_b").mkdir()
    (here / "my_rewards_b" / "manners.py").write_text(
        "def politeness(p, r, records):\n    import my_rewards_c\n    return my_rewards_c.VALUES\n"
    )
    (here / "my_rewards_c.py").write_text("VALUES = [2.0]\n")
    assert load_function("my_rewards_b.manners", "politeness")([], [], []) == [2.0]


def test_what_is_installed_is_not_hidden_by_a_file_here(here):
    (here / "fractions.py").write_text("gcd = 1 / 0\n")
    sys.modules.pop("fractions")
    assert load_function("fractions", "Fraction")(1, 2) * 2 == 1


def test_a_module_that_is_missing_is_told(here):
    assert message("my_rewards_d") == (
        "there is no module my_rewards_d, neither on Python's path nor in the current directory "
        f"({here}); start in the folder that holds it, or name that in PYTHONPATH."
    )
    assert message("my_rewards_d.manners").startswith("there is no module my_rewards_d, ")


def test_a_module_that_misses_another_is_told_of_that(here):
    (here / "my_rewards_e.py").write_text("\nimport my_rewards_missing\n")
    assert message("my_rewards_e") == (
        "the module my_rewards_e cannot be imported (ModuleNotFoundError: No module named "
        f"'my_rewards_missing', {here}/my_rewards_e.py:2); mend it."
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\ny = 1 / 0\n", "ZeroDivisionError: division by zero, .*my_rewards_f.py:2"),
        ("def f(:\n", r"SyntaxError: invalid syntax \(my_rewards_f.py, line 1\)"),
        ("import sys\nsys.exit('stop')\n", "SystemExit: stop, .*my_rewards_f.py:2"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines, .*my_rewards_f.py:1"),
    ],
)
def test_a_module_that_raises_is_told_with_the_line(here, source, reason):
    (here / "my_rewards_f.py").write_text(source)
    told = message("my_rewards_f")
    assert re.fullmatch(
        rf"the module my_rewards_f cannot be imported \({reason}\); mend it\.", told
    )


def test_a_function_that_is_missing_is_told(here):
    (here / "my_rewards_g.py").write_text("def politeness(): pass\nrude = 1\n")
    assert message("my_rewards_g", "polite") == (
        "the module my_rewards_g has no function polite; did you mean my_rewards_g:politeness?"
    )
    assert message("my_rewards_g", "rude").endswith("has no function rude; define it there.")
