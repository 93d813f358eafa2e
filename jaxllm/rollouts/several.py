"""What several responses to a prompt give together: the best of them, and what most of them say."""

import collections
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from jaxllm.rewards.exact_numbers import marked
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
    (self-consistency: Wang et al. 2022, https://arxiv.org/abs/2203.11171).

    Args:
        scores: what each response is worth; of those with the same answer the first counts.
        prompts: of the rows of `scores`.
        responses: the texts of each row.
    """
    found = []
    for row, prompt, texts in zip(scores, prompts, responses, strict=True):
        answers = [_answer(prompt, text) for text in texts]
        (commonest, _), *_ = collections.Counter(answers).most_common(1)
        found.append(row[answers.index(commonest)])
    return float(np.mean(found))


def _answer(prompt: str, response: str) -> str:
    """What a response answers, as the verifiers read it."""
    text = final_answer(prompt, response)
    return marked(text) or boxed(text) or " ".join(text.split())
