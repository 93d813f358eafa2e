"""What is trained: fields that are wrong are named."""

import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.training.config import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "("}, r"config\.train\.trainable: is no regular expression"),
        ({"ema": 1.0}, r"config\.train\.ema: must be in \[0, 1\)"),
        ({"ema": -0.1}, r"config\.train\.ema: must be in \[0, 1\)"),
        ({"max_skipped": -1}, r"config\.train\.max_skipped: must not be negative"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, changes, "train")
