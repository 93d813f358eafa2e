"""Pattern, thinking, length and repetition: known values, bounds, Chinese, hostile texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.rewards.style import Format, Length, Regex, Repetition


def score(reward, response, prompt="?"):
    (value,) = reward([prompt], [response], [{}])
    assert type(value) is float
    return value


def test_a_pattern_is_found_anywhere_or_matches_the_whole():
    assert score(Regex(r"\d+"), "it is 18.") == 1
    assert score(Regex(r"\d+"), "no idea") == 0
    assert score(Regex(r"\d+", full=True), " 18\n") == 1
    assert score(Regex(r"\d+", full=True), "it is 18") == 0
    assert score(Regex("北京"), "我爱北京。") == 1
    assert score(Regex("."), "\ud800") == 1


def test_a_response_beyond_the_limit_is_not_read():
    assert score(Regex("a", limit=3), "aaa") == 1
    assert score(Regex("a", limit=3), "aaaa") == 0
    # It would take for ever.
    assert score(Regex("(a+)+$"), "a" * 10**6 + "b") == 0


def test_a_pattern_that_is_none_is_told():
    with pytest.raises(ValueError, match=r"pattern: is no regular expression \(.*unterminated"):
        Regex("(a")
    with pytest.raises(ValueError, match="limit: must be 1 or more"):
        Regex("a", limit=0)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>a</think>b", 1),
        ("\n<think>\na\n</think>\n\nb\n", 1),
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a</think><answer> </answer>", 0),
        ("so <think>a</think>b", 0),
        ("<think>a</think>", 0),
        ("<think> </think>b", 0),
        ("<think></think>b", 0),
        ("<think>a</think> \n", 0),
        ("a</think>b", 0),
        ("<think>a b", 0),
        ("</think>a<think>b", 0),
        ("<think>a</think>b<think>c</think>d", 0),
        ("<think><think>a</think>b", 0),
        ("<think>a</think>b</think>c", 0),
        ("<THINK>a</THINK>b", 0),
        ("b", 0),
        ("", 0),
        ("<think>" * 10**5, 0),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_thinking_comes_first_and_once(response, value):
    assert score(Format(), response) == value


def test_thinking_that_the_prompt_has_opened_is_only_ended():
    assert score(Format(), "a</think>b", prompt="?\n<think>\n") == 1
    assert score(Format(), "<think>a</think>b", prompt="?\n<think>\n") == 0
    assert score(Format(), "a b", prompt="?\n<think>\n") == 0


@pytest.mark.parametrize(
    ("reward", "response", "value"),
    [
        (Length(limit=4), "", 0),
        (Length(limit=4), "abcd", 0),
        (Length(limit=4), "abcde", -0.25),
        (Length(limit=4), "abcdefgh", -1),
        (Length(limit=4), "a" * 1000, -1),
        (Length(limit=4, scale=10), "abcde", -0.1),
        (Length(limit=2, unit="words"), "one-two three", -0.5),
        (Length(limit=4), "你好世界啊", -0.25),
        (Length(limit=4, unit="words"), "你好世界 hello", -0.25),
        (Length(limit=4), "\ud800" * 5, -0.25),
    ],
)
def test_length_falls_linearly_beyond_a_limit(reward, response, value):
    assert score(reward, response) == value


@given(st.text(), st.integers(1, 20), st.integers(0, 20))
def test_length_never_rises_with_more_text(text, limit, scale):
    values = [score(Length(limit, scale), text + "a" * more) for more in range(30)]
    assert values == sorted(values, reverse=True)
    assert all(-1 <= value <= 0 for value in values)


@pytest.mark.parametrize(
    ("reward", "response", "value"),
    [
        (Repetition(n=1), "a b a b", -0.5),
        (Repetition(n=2), "a b a b a", -0.5),
        (Repetition(n=2), "a b c d e", 0),
        (Repetition(n=2), "A b a B a", -0.5),
        (Repetition(), "a b", 0),
        (Repetition(), "a b c", 0),
        (Repetition(), "", 0),
        (Repetition(n=1), "? ? ? ?", -0.75),
        (Repetition(n=1), "好好好好", -0.75),
        (Repetition(n=2), "你好你好你", -0.5),
        (Repetition(n=1), "hahahaha", 0),
        (Repetition(n=2, unit="characters"), "haha h", -0.5),
        (Repetition(n=10**9), "a b c", 0),
        (Repetition(n=1), "\ud800\ud800", -0.5),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_were_there_before(reward, response, value):
    assert score(reward, response) == value


@given(
    st.text(st.sampled_from("ab 好?")), st.integers(1, 4), st.sampled_from(["words", "characters"])
)
def test_repetition_is_between_0_and_minus_1_and_worse_when_all_is_said_twice(text, n, unit):
    reward = Repetition(n, unit)
    assert -1 < score(reward, text) <= 0
    assert score(reward, f"{text} {text} {text}") <= score(reward, text) + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Length(limit=0), "limit: must be 1 or more"),
        (lambda: Length(limit=1, scale=-1), "scale: must be 0"),
        (
            lambda: Length(limit=1, unit="tokens"),
            "unit: 'tokens' is unknown; there are words, char",
        ),
        (lambda: Repetition(n=0), "n: must be 1 or more"),
        (lambda: Repetition(unit=""), "unit: '' is unknown"),
    ],
)
def test_options_out_of_range_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
