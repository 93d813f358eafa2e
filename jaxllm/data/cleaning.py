"""Light cleaning of text, always on by configuration: Unicode, invisible characters, white space.

What looks at more than one text, or at its quality, is not done here: duplicates are found in
`duplicates.py`, and heavy curation is a stage of its own, which writes JSONL for others to read.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable

CLEANING_VERSION = 1
"""Changes when the same text may be cleaned to another."""

NORMAL_FORMS = ("NFC", "NFKC", "none")

# C0 and C1 controls but tab and line ends; soft hyphen; zero-width space and its like; marks that
# turn the direction of text; byte-order mark; interlinear annotation.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u180e\u200b"
    "\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb"
)
# Joiners shape letters in Persian and Indic scripts and build emoji, so only those that join
# nothing go.
_JOINERS = "\u200c\u200d"
_CONTROL = re.compile(f"[{_INVISIBLE}]+")
_JOINER = re.compile(f"[{_JOINERS}]+")

# NEL, vertical tab, form feed, and the line and paragraph separators are line ends; all spaces of
# fixed width are spaces, but for the ideographic one, with which Chinese and Japanese indent.
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_TRAILING = re.compile(r"(?<![ \t\u3000])[ \t\u3000]++(?=\n)")  # in linear time
_BLANK_LINES = re.compile(r"\n{4,}")  # Python separates definitions by two blank lines


@dataclasses.dataclass(frozen=True)
class CleaningConfig:
    """What is done to each text, and which are left out. In this order; on both sides of the
    held-out split."""

    control_characters: bool = True
    """Remove control, zero-width and direction characters; tabs, line ends and joiners between
    letters stay."""
    unicode: str = "NFC"
    """Normal form of Unicode: `NFC` (one code for one character), `NFKC` (compatibility forms,
    such as full-width letters, become plain ones as well), or `none`."""
    whitespace: bool = True
    """One kind of line end and of space, no trailing spaces, at most two blank lines in a row."""
    min_chars: int = 1
    """Leave out texts of fewer characters, after the above."""
    exact_duplicates: bool = True
    """Leave out all but the first of equal texts."""
    near_duplicates: float = 0.8
    """Leave out a text whose Jaccard similarity (of its runs of five words, estimated by MinHash)
    to an earlier one is at least this; 0: keep them. Training texts that resemble a text of
    `data.eval` so much are left out as well."""

    def __post_init__(self) -> None:
        if self.unicode not in NORMAL_FORMS:
            raise ValueError(f"unicode: must be one of {', '.join(NORMAL_FORMS)}")
        if self.min_chars < 1:
            raise ValueError(f"min_chars: must be at least 1; was {self.min_chars}")
        if not (self.near_duplicates == 0 or 0.5 <= self.near_duplicates <= 1):
            raise ValueError(
                f"near_duplicates: must be from 0.5 to 1, or 0 for none; was {self.near_duplicates}"
            )


NO_CLEANING = CleaningConfig(
    control_characters=False,
    unicode="none",
    whitespace=False,
    exact_duplicates=False,
    near_duplicates=0.0,
)
"""Text as it comes."""


class Cleaner:
    """Cleans texts one by one, and counts the texts that each step has changed or left out."""

    def __init__(self, config: CleaningConfig) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        """Texts that each step has changed, and that `min_chars` has left out, by its name."""
        self._min_chars = config.min_chars
        self._steps: dict[str, Callable[[str], str]] = {}
        if config.control_characters:
            self._steps["control_characters"] = without_control_characters
        if config.unicode != "none":
            form = config.unicode
            self._steps["unicode"] = lambda text: normalized(text, form)
        if config.whitespace:
            self._steps["whitespace"] = with_plain_whitespace

    def __call__(self, text: str) -> str | None:
        """The cleaned text, or None if too little is left of it."""
        for name, step in self._steps.items():
            cleaned = step(text)
            if cleaned != text:
                self.counts[name] += 1
            text = cleaned
        if len(text) < self._min_chars or not text.strip():
            self.counts["min_chars"] += 1
            return None
        return text


def normalized(text: str, form: str) -> str:
    """`text` in a normal form of Unicode (https://unicode.org/reports/tr15)."""
    # ASCII is in every form, and most text can be seen quickly to be in NFC already.
    if text.isascii() or unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return text
    return unicodedata.normalize(form, text)  # type: ignore[arg-type]


def without_control_characters(text: str) -> str:
    """`text` without characters that nobody sees and that carry no meaning."""
    text = _CONTROL.sub("", text)
    return text if text.isascii() else _JOINER.sub(_joining, text)


def with_plain_whitespace(text: str) -> str:
    """`text` with plain line ends and spaces, and none of them to spare; indentation stays."""
    if not text.isascii() or any(end in text for end in "\r\x0b\x0c"):
        text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
    if any(f"{space}\n" in text for space in " \t\u3000"):
        text = _TRAILING.sub("", text)
    return _BLANK_LINES.sub("\n\n\n", text).lstrip("\n").rstrip()


def _joining(joiners: re.Match[str]) -> str:
    """Joiners that stand between two visible characters, or nothing."""
    text, (begin, end) = joiners.string, joiners.span()
    inside = begin > 0 and end < len(text)
    return joiners[0] if inside and not any(text[n].isspace() for n in (begin - 1, end)) else ""
