"""A calculator that a policy may ask while it writes: `<<12*4=` is gone on with by `48>>`.

So GSM8K writes its calculations (Cobbe et al. 2021, appendix A, https://arxiv.org/abs/2110.14168).
An expression is read, never run (`rewards/expressions.py`).
"""

from fractions import Fraction

from jaxllm.rewards.expressions import compute

CALL = r"<<[^<>=\n]{1,200}="
"""How the last signs of a text ask for a result."""

_DIGITS = 6
"""Behind the point, at the most."""


def result_of(text: str) -> str:
    """What goes on with a text that ends with a call; empty where it asks for no number."""
    expression = text.rpartition("<<")[2].removesuffix("=")
    try:
        return f"{_written(compute(expression).value)}>>"
    except ValueError:
        return ""


def _written(value: Fraction) -> str:
    """A number as people write it: whole, or as a decimal without zeros at its end."""
    if value.denominator == 1:
        return str(value.numerator)
    written = f"{float(value):.{_DIGITS}f}".rstrip("0").rstrip(".")
    return "0" if written == "-0" else written
