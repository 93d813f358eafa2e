"""Rules that a response keeps to or not, by name: lengths, words, formats.

Of Chinese and Japanese each character is a word. Every expression here takes time in proportion to
the response, whatever it is.
"""

import collections
import dataclasses
import functools
import json
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping

from jaxllm.data.words import UNSPACED, WORD

_SPACED_END = re.compile(rf"[^\W{UNSPACED}]")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+(?=[\s\"'”’)\]]|$)|[。！？]+")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_BULLET = re.compile(r"^[ \t]*(?:[*•][^*\n]|-[^-\n])", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
_HIGHLIGHT = re.compile(r"(\*\*|\*)(?!\s)[^\n*]+\1")
_TITLE = re.compile(r"<<([^\n<>]+)>>")
_HYPHENATED = re.compile(r"[^\W\d_][\w'’-]*")
_QUOTES = ('""', "“”", "「」", "『』")
_COMMAS = re.compile("[,，、]")

# Of the languages that IFEval asks for, and some more.
_SCRIPTS = {
    "LATIN": "de en es fi fr it nl pl pt sv sw tr vi",
    "CYRILLIC": "bg ru uk",
    "ARABIC": "ar fa ur",
    "DEVANAGARI": "hi mr ne",
    "CJK": "zh ja",
    "HANGUL": "ko",
    "BENGALI": "bn",
    "GREEK": "el",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HEBREW": "he",
    "KANNADA": "kn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
}
_SCRIPT_OF = {code: script for script, codes in _SCRIPTS.items() for code in codes.split()}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a response has to keep to."""

    holds: Callable[..., bool]
    """Takes the response, and the parameters by name."""
    parameters: Mapping[str, type]
    """Name and type of each: `int`, `str`, or `list`, of strings."""


def _blocks(response: str) -> list[str]:
    """What stands between blank lines."""
    return [block for block in _PARAGRAPH_END.split(response) if block.strip()]


def _whole_word(word: str) -> re.Pattern[str]:
    """Finds a word, not within another where words are divided by spaces."""
    begin, end = (
        "" if not _SPACED_END.fullmatch(sign) else side
        for sign, side in ((word[:1], r"(?<!\w)"), (word[-1:], r"(?!\w)"))
    )
    return re.compile(begin + re.escape(word) + end, re.IGNORECASE)


def _words(response: str) -> int:
    return sum(1 for _ in WORD.finditer(response))


def _sentences(response: str) -> int:
    pieces = _SENTENCE_END.split(response)
    return sum(1 for piece in pieces if WORD.search(piece))


def _paragraphs(response: str) -> int:
    return len(_blocks(response))


def _starred_paragraphs(response: str) -> int:
    """Parts divided by `***`; none if one in the middle is empty."""
    parts = [part.strip() for part in response.strip().split("***")]
    inner = parts[1:-1]
    return sum(map(bool, parts)) if all(inner) else 0


def _bullets(response: str) -> int:
    return len(_BULLET.findall(response))


def _placeholders(response: str) -> int:
    return len(_PLACEHOLDER.findall(response))


def _highlights(response: str) -> int:
    return len(_HIGHLIGHT.findall(response))


def _sections(response: str, heading: str) -> int:
    return len(re.findall(rf"{re.escape(heading)}\s?\d", response))


def _capital_words(response: str) -> int:
    return sum(word.isupper() for word in _HYPHENATED.findall(response))


def _keyword(response: str, keyword: str) -> int:
    return response.casefold().count(keyword.casefold())


def _letter(response: str, letter: str) -> int:
    return collections.Counter(response.casefold())[letter.casefold()]


# What is there or not.


def _keywords(response: str, keywords: list[str]) -> bool:
    return all(_keyword(response, keyword) for keyword in keywords)


def _forbidden(response: str, words: list[str]) -> bool:
    return not any(_whole_word(word).search(response) for word in words)


def _json_only(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str) -> bool:
    return any(title.strip() for title in _TITLE.findall(response))


def _starts_with(response: str, phrase: str) -> bool:
    return response.strip().casefold().startswith(phrase.strip().casefold())


def _ends_with(response: str, phrase: str) -> bool:
    return response.strip().strip('"').casefold().endswith(phrase.strip().casefold())


def _postscript(response: str, marker: str) -> bool:
    """The marker begins a word; a space may follow each of its dots."""
    spaced = re.escape(marker.strip()).replace(r"\.", r"\.\s?")
    return bool(re.search(rf"(?:^|\s){spaced}", response, re.IGNORECASE))


def _paragraph_begins(response: str, n: int, place: int, word: str) -> bool:
    """There are `n` paragraphs, and that at `place`, counted from 1, begins with the word."""
    blocks = _blocks(response)
    if len(blocks) != n or not 1 <= place <= n:
        return False
    start = blocks[place - 1].strip().lstrip("\"'“‘「")
    return bool(_whole_word(word).match(start))


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _one_of(response: str, options: list[str]) -> bool:
    return any(option in response for option in options)


def _quoted(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] + text[-1] in _QUOTES


def _no_commas(response: str) -> bool:
    return not _COMMAS.search(response)


def _language(response: str, language: str) -> bool:
    """Most letters are of the language's script; languages of one script are not told apart."""
    names = collections.Counter(
        name.split()[0].replace("HIRAGANA", "CJK").replace("KATAKANA", "CJK")
        for name in (unicodedata.name(letter, "?") for letter in response if letter.isalpha())
    )
    return 2 * names[_SCRIPT_OF[language]] > names.total()


def _related(
    count: Callable[..., int],
    relation: Callable[[int, int], bool],
    response: str,
    n: int,
    **others: str,
) -> bool:
    return relation(count(response, **others), n)


_COUNTS: dict[str, tuple[Callable[..., int], dict[str, type]]] = {
    "words": (_words, {}),
    "sentences": (_sentences, {}),
    "paragraphs": (_paragraphs, {}),
    "starred_paragraphs": (_starred_paragraphs, {}),
    "bullets": (_bullets, {}),
    "placeholders": (_placeholders, {}),
    "highlights": (_highlights, {}),
    "sections": (_sections, {"heading": str}),
    "capital_words": (_capital_words, {}),
    "keyword": (_keyword, {"keyword": str}),
    "letter": (_letter, {"letter": str}),
}
_RELATIONS = {"at_least": operator.ge, "at_most": operator.le, "exactly": operator.eq}

RULES: dict[str, Rule] = {
    "keywords": Rule(_keywords, {"keywords": list}),
    "forbidden": Rule(_forbidden, {"words": list}),
    "json": Rule(_json_only, {}),
    "title": Rule(_title, {}),
    "starts_with": Rule(_starts_with, {"phrase": str}),
    "ends_with": Rule(_ends_with, {"phrase": str}),
    "postscript": Rule(_postscript, {"marker": str}),
    "paragraph_begins": Rule(_paragraph_begins, {"n": int, "place": int, "word": str}),
    "two_responses": Rule(_two_responses, {}),
    "one_of": Rule(_one_of, {"options": list}),
    "quoted": Rule(_quoted, {}),
    "uppercase": Rule(str.isupper, {}),
    "lowercase": Rule(str.islower, {}),
    "no_commas": Rule(_no_commas, {}),
    "language": Rule(_language, {"language": str}),
} | {
    f"{name}_{relation}": Rule(functools.partial(_related, count, holds), {"n": int, **parameters})
    for name, (count, parameters) in _COUNTS.items()
    for relation, holds in _RELATIONS.items()
}
"""By name; what is counted has the three rules `_at_least`, `_at_most` and `_exactly`."""

LANGUAGES = tuple(sorted(_SCRIPT_OF))
"""Codes that the rule `language` knows."""
