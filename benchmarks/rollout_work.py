"""What benchmarks/rollouts.py asks of ours and of the others alike: prompts, rewards, and where an
iteration's time goes."""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from in_turn import Step
from llama import VOCAB

ROWS, GROUP, PROMPT, NEW = 32, 8, 32, 64
EPOCHS, KL_LOSS, KL_REWARD = 4, 0.04, 0.05
GRPO_TEMPERATURE, PPO_TEMPERATURE = 1.0, 0.7
END, PADDING = "</s>", "<pad>"
WARM_UP = 3
"""Iterations that `work` makes before any is counted."""


class Laps:
    """Where the time of iterations goes."""

    def __init__(self) -> None:
        self._last = 0.0
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def end(self, part: str) -> None:
        """What has been done since the last part ended was this one."""
        now = time.perf_counter()
        self._seconds[part].append(now - self._last)
        self._last = now

    def ending(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose return ends a part."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.end(part)
            return result

        return timed

    def of(self, run: Callable[[], None], last: str) -> Step:
        """The iteration, whose return ends the last part."""
        timed = self.ending(last, run)

        def step() -> None:
            self._last = time.perf_counter()
            timed()

        return step

    def __str__(self) -> str:
        medians = {
            part: statistics.median(seconds[WARM_UP:]) for part, seconds in self._seconds.items()
        }
        return ", ".join(f"{part} {median:.2f} s" for part, median in medians.items())


def prompts(count: int) -> np.ndarray:
    """[count, tokens]"""
    return np.random.default_rng(0).integers(0, VOCAB, (count, PROMPT))


def texts(count: int) -> list[str]:
    """The prompts, as the tokenizer reads them."""
    return [" ".join(f"t{n}" for n in row) for row in prompts(count)]


def rewards(responses: Sequence[str]) -> list[float]:
    """What responses are worth; all of them are of as many tokens."""
    assert all(len(response.split()) == NEW for response in responses)
    return [len(response) / NEW for response in responses]


def words() -> Any:
    """Tokens are the words t0, t1, …, and behind the model's vocabulary those it cannot write."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    names.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names.add_special_tokens([END, PADDING])
    return names


def transformers_words() -> Any:
    """`words` for the others."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=END, pad_token=PADDING)
