"""Cleaning: what goes, what stays, and that cleaning twice is cleaning once."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import from_dict
from jaxllm.data.cleaning import NO_CLEANING, Cleaner, CleaningConfig
from jaxllm.errors import UserError


def clean(text, **options):
    return Cleaner(CleaningConfig(**options))(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("cafe\u0301", "caf\u00e9"),  # one code for one character
        ("\ufeffbyte-order mark", "byte-order mark"),
        ("zero\u200bwidth\u2060\u00ad", "zerowidth"),
        ("nul\x00 bell\x07 escape\x1b[31m", "nul bell escape[31m"),
        ("direction\u202eeht", "directioneht"),
        ("one\r\ntwo\rthree\u2028four\x85five", "one\ntwo\nthree\nfour\nfive"),
        ("end of page\x0cnext page\x0bcolumn", "end of page\nnext page\ncolumn"),
        ("e\u200b\u0301 e\u00ad\u0301", "\u00e9 \u00e9"),  # what stood between went first
        ("a\u200d\ufeff b", "a b"),
        ("no\u00a0break\u2009thin\u202f", "no break thin"),
        ("trailing   \t\nspaces \n", "trailing\nspaces"),
        ("\n\n\n  indented first line", "  indented first line"),
        ("a\n\n\n\n\n\nb\n\n\nc", "a\n\n\nb\n\n\nc"),
        ("joiners that join nothing \u200d \u200c.\u200d", "joiners that join nothing  ."),
    ],
)
def test_what_is_changed(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "plain text, with a tab:\tend",
        "def f(x):\n    if x:\n        return 1\n\n\nclass A:\n    pass",
        "\u3000\u3000床前明月光，疑是地上霜。\n\u3000\u3000举头望明月，低头思故乡。",
        "family \U0001f469\u200d\U0001f469\u200d\U0001f467, flag \U0001f3f3\ufe0f\u200d\U0001f308",
        "می\u200cخواهم",  # a joiner that shapes letters
        "ＡＢＣ ﬁ ①",  # compatibility forms: another thing, as long as NFC is asked for
    ],
)
def test_what_stays(text):
    cleaner = Cleaner(CleaningConfig())
    assert cleaner(text) == text
    assert not cleaner.counts


def test_compatibility_forms_are_made_plain_when_asked_for():
    assert clean("ＡＢＣ ﬁ ①", unicode="NFKC") == "ABC fi 1"
    assert clean("cafe\u0301", unicode="none") == "cafe\u0301"


_RARE = "\n\r \t\u200c\u200d\u00a0\u3000\x00\x0c\u200b\u00ad\ufeff\u0301\u0327e"


@settings(max_examples=500)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(_RARE))))
def test_cleaning_twice_is_cleaning_once(text):
    once = clean(text)
    if once is not None:
        assert clean(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert "\r" not in once
        assert "\x00" not in once


@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_no_cleaning_changes_nothing(text):
    assert Cleaner(NO_CLEANING)(text) == text


def test_long_runs_take_linear_time():
    begin = time.perf_counter()
    clean("x" + " " * 300_000 + "y \nz")
    clean("x" + "\u200d" * 300_000 + "y")
    assert time.perf_counter() - begin < 2


def test_each_step_is_counted_and_can_be_turned_off():
    cleaner = Cleaner(CleaningConfig(min_chars=5))
    for text in (
        "e\u0301 and more",
        "a\x00bcdef",
        "trailing \nspace",
        "abcd",
        "\u200b \u200b",
        "plain text",
    ):
        cleaner(text)
    assert cleaner.counts == {
        "unicode": 1,
        "control_characters": 2,
        "whitespace": 2,
        "min_chars": 2,
    }
    assert clean("a\x00b", control_characters=False) == "a\x00b"
    assert clean("a \nb", whitespace=False) == "a \nb"


def test_texts_that_are_too_short_are_left_out():
    assert clean("abcd", min_chars=5) is None
    assert clean(" \u200b\n") is None


@pytest.mark.parametrize(
    "fields",
    [{"unicode": "NFD"}, {"min_chars": 0}, {"near_duplicates": 0.2}, {"near_duplicates": 2.0}],
)
def test_wrong_options_are_named(fields):
    (name,) = fields
    with pytest.raises(UserError, match=rf"config\.data\.cleaning\.{name}"):
        from_dict(CleaningConfig, fields, "data.cleaning")
