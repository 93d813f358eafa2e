"""What a tokenizer makes of text, in numbers that can be counted by hand."""

import pytest

from jaxllm.tokenizers.comparison import measure


def test_bytes_are_measured_as_they_must_be(trained):
    found = measure(trained("bytes"), ["ab", "明", ""])
    assert (found.vocab_size, found.bytes_per_token) == (273, 1.0)
    assert (found.unknown_rate, found.lossless) == (0.0, 1.0)
    assert found.megabytes_per_second > 0


def test_what_is_lost_and_unknown_is_counted(trained):
    texts = ["the", "the  work", "한", "한 the"]  # the second and the last two do not come back
    found = measure(trained("charbpe"), texts, workers=1)
    tokens = [trained("charbpe").encode(text) for text in texts]
    assert found.lossless == 1 / 4
    assert found.unknown_rate == 2 / sum(map(len, tokens))
    assert found.bytes_per_token == (3 + 9 + 3 + 7) / sum(map(len, tokens))


def test_white_space_without_tokens_divides_by_nothing(trained):
    found = measure(trained("wordpiece"), ["  "])
    assert (found.bytes_per_token, found.unknown_rate, found.lossless) == (0.0, 0.0, 0.0)


def test_no_text_is_refused(trained):
    with pytest.raises(ValueError, match="no text"):
        measure(trained("bpe"), [""])
