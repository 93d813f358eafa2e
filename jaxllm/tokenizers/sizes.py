"""What a trainer says when a vocabulary cannot be of the size asked for."""


class SizeError(ValueError):
    """The size asked for is impossible for this kind and this text; `possible` is the nearest."""

    def __init__(self, possible: int):
        super().__init__(possible)
        self.possible = possible


class TooLargeError(SizeError):
    """The text gives only `possible` tokens."""


class TooSmallError(SizeError):
    """The characters of the text, bytes and special tokens alone make `possible` tokens."""


class NoTextError(ValueError):
    """There is no text to learn from."""
