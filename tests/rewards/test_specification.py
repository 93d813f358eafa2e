"""The grammar of `rewards`: what it reads, and each mistake told in one line."""

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import UserError
from jaxllm.rewards.arithmetic import Arithmetic
from jaxllm.rewards.specification import REWARDS, parse_rewards
from jaxllm.rewards.style import Format, Length, Regex, Repetition
from jaxllm.rewards.verifiers import ExactMatch, Numeric


def ones(prompts, responses, records):
    return [1.0 for _ in responses]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    own = types.ModuleType("my_rewards")
    own.politeness = own.inf = ones
    monkeypatch.setitem(sys.modules, "my_rewards", own)


def parsed(spec, **options):
    parts = parse_rewards(spec, "rewards", **options).parts
    return [(part.name, part.function, part.weight) for part in parts]


def message(spec, **options):
    with pytest.raises(UserError) as told:
        parse_rewards(spec, "rewards", **options)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("spec", "name", "function", "weight"),
    [
        ("numeric", "numeric", Numeric(), 1),
        (" numeric : 2 ", "numeric", Numeric(), 2),
        ("exact_match:-0.5", "exact_match", ExactMatch(), -0.5),
        ("format():1e-1", "format", Format(), 0.1),
        ("repetition:0", "repetition", Repetition(), 0),
        ("length(limit=200)", "length", Length(200), 1),
        ("length(200, scale=50,unit=words):.1", "length", Length(200, 50, "words"), 0.1),
        ("arithmetic(use_all=True, partial=1e-1)", "arithmetic", Arithmetic(True, 0.1), 1),
        ("arithmetic(false)", "arithmetic", Arithmetic(False), 1),
        (r"regex(\d+$):3", "regex", Regex(r"\d+$"), 3),
        (r'regex("\(a,b\):\d=\'"):3', "regex", Regex(r"\(a,b\):\d=\'"), 3),
        ("regex('say \"[(]\"', full=True)", "regex", Regex('say "[(]"', full=True), 1),
        ("regex(pattern=a=b:c)", "regex", Regex("a=b:c"), 1),
        ("regex(好，)", "regex", Regex("好，"), 1),
        ("short=length(9):2", "short", Length(9), 2),
        ("my_rewards:politeness", "politeness", ones, 1),
        ("my_rewards:politeness:0.5", "politeness", ones, 0.5),
        ("my_rewards:inf:0.5", "inf", ones, 0.5),
        ("kind=my_rewards:politeness:-1", "kind", ones, -1),
    ],
)
def test_one_reward(spec, name, function, weight):
    assert parsed(spec) == [(name, function, weight)]


def test_several_rewards_score_together():
    spec = "numeric:1, length(limit=2):0.5,my_rewards:politeness:0.25,a=regex('[(,]'),b=regex(9),"
    rewards = parse_rewards(spec, "rewards")
    assert [part.name for part in rewards.parts] == ["numeric", "length", "politeness", "a", "b"]
    scores = rewards(["?"], ["(9)"], [{"answer": 9}])
    assert scores.total.tolist() == [1 - 0.25 + 0.25 + 1 + 1]


def test_a_reward_model_is_known_where_one_is_given():
    rewards = parse_rewards("reward_model:2,format", "rewards", {"reward_model": ones})
    assert [part.is_model for part in rewards.parts] == [True, False]
    assert rewards(["?"], ["x"], [{}]).total.tolist() == [2]
    assert message("reward_model:2") == (
        "config.rewards: reward_model:2: no reward model is given; name its run in "
        "config.reward.init."
    )


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_says_what_it_is_and_can_be_named(name):
    assert REWARDS[name].__doc__
    needed = {"regex": "(a)", "length": "(9)"}.get(name, "")
    assert parsed(name + needed)[0][0] == name


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "config.rewards: names no reward; there are exact_match, numeric, arithmetic, "),
        (" , ", "config.rewards: names no reward"),
        (
            "numerik:2",
            "config.rewards: numerik:2: there is no reward numerik; did you mean numeric",
        ),
        ("xyz", "there is no reward xyz; there are exact_match, numeric,"),
        ("numeric 2", "config.rewards: numeric 2: is not [NAME=]REWARD[(OPTION=VALUE, …)]"),
        ("numeric:1:2", "numeric:1:2: is not [NAME=]REWARD"),
        ("2", "2: is not [NAME=]REWARD"),
        ("numeric:", "numeric:: is not [NAME=]REWARD"),
        ("numeric:two", "numeric:two: its weight must be a finite number; was 'two'."),
        ("numeric:nan", "its weight must be a finite number; was 'nan'."),
        ("my_rewards:politeness:inf", "its weight must be a finite number; was 'inf'."),
        ("numeric:1..2", "its weight must be a finite number; was '1..2'."),
        ("numeric,numeric:2", "two rewards are called numeric; write NAME= before one of them"),
        ("length(9", "config.rewards: a parenthesis is not closed or not opened in 'length(9'."),
        ("format,length 9)", "a parenthesis is not closed or not opened in 'length 9)'."),
        ("regex('a)", "a quote ' is not closed or not opened in \"regex('a)\"."),
        ("length", "length: length needs its option limit, as in length(limit=…)."),
        ("length(scale=9)", "length needs its option limit"),
        ("length(9, 9)", "'9' is not OPTION=VALUE; its options are limit, scale, unit."),
        ("length(9,)", "'' is not OPTION=VALUE"),
        ("numeric(9)", "'9' is not OPTION=VALUE; it takes none."),
        ("numeric(a=9)", "numeric has no option a; it takes none."),
        ("length(most=9)", "length has no option most; its options are limit, scale, unit."),
        ("length(9, limit=8)", "limit is given twice; once is enough."),
        ("length(nine)", "length(nine): limit: must be a whole number; was 'nine'."),
        ("length(1.5)", "limit: must be a whole number; was '1.5'."),
        ("arithmetic(partial=x)", "partial: must be a number; was 'x'."),
        ("arithmetic(use_all=1)", "use_all: must be True or False; was '1'."),
        ("length(0)", "config.rewards: length(0): limit: must be 1 or more."),
        ("length(1,unit=x)", "unit: 'x' is unknown; there are words, characters."),
        ("regex([)", "pattern: is no regular expression (unterminated"),
        ("regex((a))", "pattern: (a) holds quotes or parentheses; put all of it into quotes."),
        ("regex('a' 'b')", "pattern: 'a' 'b' is not one text in quotes; use those of the other"),
        (
            "my_rewards:rude",
            "config.rewards: my_rewards:rude: the module my_rewards has no function",
        ),
        ("no_such_module:f:2", "no_such_module:f:2: there is no module no_such_module, neither"),
        ("my_rewards:politeness(a=1)", "politeness takes no options; leave out (a=1)."),
        ("my_rewards", "there is no reward my_rewards; there are"),
    ],
)
def test_mistakes_are_told(spec, told):
    assert told in message(spec)
    assert message(spec).startswith("config.rewards: ")


@given(st.text(st.sampled_from("ab1.:,=()'\"\\ _\ud800")))
def test_any_text_is_read_or_refused(spec):
    try:
        parse_rewards(f"numeric{spec}", "rewards")
    except UserError as error:
        assert str(error).startswith("config.rewards: ")


@given(st.text(st.characters(exclude_characters="'", exclude_categories=["Cs"])))
def test_no_sign_is_special_within_quotes(text):
    try:
        wanted = Regex(text)
    except ValueError:
        return
    assert parsed(f"regex('{text}'):2") == [("regex", wanted, 2)]
