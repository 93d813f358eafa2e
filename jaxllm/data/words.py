"""What a word is where none are divided by spaces, for all that counts or compares words."""

import re

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""The characters of Chinese and Japanese, as ranges within a class of a regular expression: each
of them is a word."""

WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
"""A word: letters, digits and underscores."""

WORD_OR_MARK = re.compile(rf"{WORD.pattern}|[^\w\s]")
"""A word, or any other sign but white space."""
