"""Numbers as people read them: counts, bytes, durations, shares."""

import math

Number = int | float
"""Spelled out, because run-time type checking does not take an int for a float."""


def count(value: Number) -> str:
    """Three significant digits with a thousands letter: 950, 10.2k, 1.24B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 is 1.00M, not 1000k: the next larger unit starts where rounding reaches it.
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)}{letter}"
    return f"{value:.0f}" if float(value).is_integer() else _three_digits(value)


def byte_count(value: Number) -> str:
    """Bytes in powers of 1000, the way disks and data sets are counted: 950 B, 12.3 MB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: Number) -> str:
    """Two units at most: 0.42s, 8.3s, 45s, 1m32s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 1:
        return f"{seconds:.2f}s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def share(value: Number) -> str:
    """A fraction as a percentage: 0.41 is 41.0%, and 0.0004 is 0.04%."""
    digits = 2 if 0 < abs(value) < 0.001 else 1
    return f"{100 * value:.{digits}f}%"


def number(value: Number) -> str:
    """Four significant digits; whole numbers in full with thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _three_digits(value: Number) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
