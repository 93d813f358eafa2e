"""Numbers as people read them, at the edges where units change."""

import pytest

from jaxllm.reporting import quantities


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (3.217, "3.22"),
        (999.7, "1.00k"),
        (10_234, "10.2k"),
        (99_960, "100k"),
        (999_940, "1.00M"),
        (8_523_264, "8.52M"),
        (1.24e9, "1.24B"),
        (-1500, "-1.50k"),
    ],
)
def test_count(value, text):
    assert quantities.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42s"),
        (8.3, "8.3s"),
        (9.97, "10s"),
        (59.6, "1m00s"),
        (92, "1m32s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (86_399, "1d00h"),
        (3 * 86_400 + 4 * 3600, "3d04h"),
        (float("inf"), "?"),
    ],
)
def test_duration(seconds, text):
    assert quantities.duration(seconds) == text


def test_share_number_and_bytes():
    assert quantities.share(0.41) == "41.0%"
    assert quantities.share(0.0004) == "0.04%"
    assert quantities.share(0.0) == "0.0%"
    assert quantities.number(8_523_264) == "8,523,264"
    assert quantities.number(1.61234) == "1.612"
    assert quantities.number(float("nan")) == "nan"
    assert quantities.byte_count(999) == "999 B"
    assert quantities.byte_count(17_123_000) == "17.1 MB"
