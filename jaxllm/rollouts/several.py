"""What several responses to a prompt give together: the best of them, and what most of them say."""

import collections
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64

from jaxllm.rewards.exact_numbers import marked, number_in
from jaxllm.rewards.final_answer import boxed, final_answer

Scores = Float64[np.ndarray, "prompts samples"]


def best_of(scores: Scores, count: int) -> float:
    """The mean over prompts of the highest of `count` scores, in expectation over which of the
    samples they are.

    Of scores of 0 and 1 it is pass@k (Chen et al. 2021, section 2.1, whose estimator this is:
    https://arxiv.org/abs/2107.03374).
    """
    samples = scores.shape[1]
    # How often the sample of each rank, the lowest first, is the highest of `count`.
    ways = [math.comb(rank, count - 1) for rank in range(samples)]
    shares = np.array(ways) / math.comb(samples, count)
    return float(np.mean(np.sort(scores, axis=1) @ shares))


def majority_of(
    scores: Scores, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> float:
    """The mean over prompts of what the commonest answer is worth, the first of several
    (self-consistency: Wang et al. 2022, https://arxiv.org/abs/2203.11171). Numbers are the same
    however they are written, and a response without an answer has no say, unless all are.

    Args:
        scores: what each response is worth; of those with the same answer the first counts.
        prompts: of the rows of `scores`.
        responses: the texts of each row.
    """
    found = []
    for row, prompt, texts in zip(scores, prompts, responses, strict=True):
        answers = [_answer(prompt, text) for text in texts]
        votes = collections.Counter(answer for answer in answers if answer != "")
        (commonest, _), *_ = votes.most_common(1) or [("", 0)]
        found.append(row[answers.index(commonest)])
    return float(np.mean(found))


def _answer(prompt: str, response: str) -> Fraction | str:
    """What a response answers: a number, as `numeric` reads it, where there is one."""
    text = final_answer(prompt, response)
    number = number_in(marked(text) or boxed(text) or text)
    return " ".join(text.split()) if number is None else number
