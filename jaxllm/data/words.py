"""What a word is where none are divided by spaces, for all that counts or compares words."""

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""The characters of Chinese and Japanese, as ranges within a class of a regular expression: each
of them is a word."""
