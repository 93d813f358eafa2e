"""The page on rewards: its table is complete, and its examples do what it says."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from jaxllm.rewards.specification import REWARDS, parse_rewards

PAGE = (Path(__file__).parent.parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
SPECS = re.findall(r"--config\.rewards='?([^'\n]+)'?\n", PAGE)


def row(name):
    return next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))


@pytest.mark.parametrize("name", REWARDS)
def test_the_table_has_every_reward_and_option_with_its_default(name):
    for field in dataclasses.fields(REWARDS[name]):
        given = "" if field.default is dataclasses.MISSING else f"={field.default}"
        assert f"`{field.name}{given}`" in row(name)


def test_the_examples_are_read_and_the_function_judges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = re.search(r"```python\n(def .*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / "manners.py").write_text(source)
    first, scored, own = (parse_rewards(spec, "rewards") for spec in SPECS)
    sys.modules.pop("manners")
    assert [part.name for part in first.parts] == ["numeric", "format", "length"]
    assert [part.name for part in scored.parts] == ["numeric", "length"]
    scores = own(["2?"] * 3, ["2, thanks", "please", "no"], [{"answer": 2}] * 3)
    assert scores.by_name["politeness"].tolist() == [1, 0.5, 0]
    assert scores.total.tolist() == [1.5, 0.25, 0]


def test_entries_in_the_text_are_read():
    for spec in (r"length(200)", r"regex(\d+)", r'regex("\(a, b\)")', "digits=regex("):
        assert f"`{spec}" in PAGE
        if spec.endswith("("):
            spec = re.search(r"`(digits=[^`]+)`", PAGE)[1]
        assert parse_rewards(spec, "rewards").parts
    assert not re.search(r"(?:a+)++$", "a" * 50_000 + "b")
