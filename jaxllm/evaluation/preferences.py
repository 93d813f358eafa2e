"""How well rewards tell which of two responses is preferred, and how much of that is length."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

_MOST_SOURCES = 20  # that are named; the accuracy of more says little
_OTHERS = "others"
_BINS = 10
"""Of confidence between 1/2 and 1, in a calibration table."""


@dataclasses.dataclass(frozen=True)
class RatedRanking:
    """A ranking, and the reward of each of its responses."""

    source: str
    """Where it is from."""
    scores: Sequence[float]
    """How good people say that each response is."""
    lengths: Sequence[int]
    """Of each response, in tokens."""
    rewards: Sequence[float]


class _Pairs(NamedTuple):
    """All pairs of better and worse responses."""

    weights: Float64[np.ndarray, " pairs"]
    """1 / pairs of the ranking."""
    rewards: Float64[np.ndarray, " pairs"]
    """That of the better less that of the worse."""
    lengths: Float64[np.ndarray, " pairs"]
    """The same of their lengths."""
    sources: Sequence[str]


def preference_scores(rankings: Sequence[RatedRanking]) -> dict[str, float]:
    """Scores of rewards, by the names of `summary.json`; each ranking counts once.

    - `eval/accuracy`: share of pairs whose better response has the higher reward; a tie is half.
    - `eval/accuracy/better_is_longer`, `…_shorter`: the same of pairs where it is so.
    - `eval/longer_is_better`: the accuracy of always preferring the longer response.
    - `eval/explained_by_length`: R² of a line through 0 from the difference in length to that in
      reward: what length alone explains of it.
    - `eval/calibration_error`: the mean distance of the share of right pairs from the probability
      σ(|r - r'|) that was given to them, by bins of it (Guo et al. 2017,
      https://arxiv.org/abs/1706.04599).
    - `preference/SOURCE/accuracy` and `…/rankings`, of the 20 commonest sources and all others.
    """
    pairs = _pairs(rankings)
    if not len(pairs.weights):
        return {}
    right = _right(pairs.rewards)
    scores = {
        "eval/accuracy": _mean(right, pairs.weights),
        "eval/longer_is_better": _mean(_right(pairs.lengths), pairs.weights),
        "eval/explained_by_length": _explained(pairs),
        "eval/calibration_error": sum(
            each["share"] * abs(each["predicted"] - each["observed"])
            for each in calibration(rankings)
        ),
        "eval/rankings": float(len(rankings)),
    }
    for name, chosen in (("longer", pairs.lengths > 0), ("shorter", pairs.lengths < 0)):
        if chosen.any():
            found = _mean(right[chosen], pairs.weights[chosen])
            scores[f"eval/accuracy/better_is_{name}"] = found
    counts = collections.Counter(ranking.source for ranking in rankings)
    named = {source for source, _ in counts.most_common(_MOST_SOURCES)}
    names = np.array([name if name in named else _OTHERS for name in pairs.sources])
    for source in dict.fromkeys(names.tolist()):
        chosen = names == source
        scores[f"preference/{source}/accuracy"] = _mean(right[chosen], pairs.weights[chosen])
        count = (
            counts[source]
            if source in named
            else counts.total() - sum(counts[name] for name in named)
        )
        scores[f"preference/{source}/rankings"] = float(count)
    return scores


def calibration(rankings: Sequence[RatedRanking]) -> list[dict[str, float]]:
    """By bins of the probability that is given to the preferred response of a pair: its mean
    (`predicted`), the share of pairs that are right (`observed`), and the bin's share of all."""
    pairs = _pairs(rankings)
    confidence = 1 / (1 + np.exp(-np.abs(pairs.rewards)))
    right = _right(pairs.rewards)
    bins = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    found = []
    for number in range(_BINS):
        chosen = bins == number
        if chosen.any():
            weights = pairs.weights[chosen]
            found.append(
                {
                    "predicted": _mean(confidence[chosen], weights),
                    "observed": _mean(right[chosen], weights),
                    "share": float(weights.sum() / pairs.weights.sum()),
                }
            )
    return found


def _pairs(rankings: Sequence[RatedRanking]) -> _Pairs:
    weights: list[float] = []
    rewards: list[float] = []
    lengths: list[float] = []
    sources: list[str] = []
    for ranking in rankings:
        places = range(len(ranking.scores))
        found = [
            (i, j)
            for i, j in itertools.permutations(places, 2)
            if ranking.scores[i] > ranking.scores[j]
        ]
        for better, worse in found:
            weights.append(1 / len(found))
            rewards.append(ranking.rewards[better] - ranking.rewards[worse])
            lengths.append(ranking.lengths[better] - ranking.lengths[worse])
            sources.append(ranking.source)
    return _Pairs(
        np.array(weights, np.float64),
        np.array(rewards, np.float64),
        np.array(lengths, np.float64),
        sources,
    )


def _right(differences: Float64[np.ndarray, " pairs"]) -> Float64[np.ndarray, " pairs"]:
    return np.where(differences == 0, 0.5, (differences > 0).astype(np.float64))


def _mean(
    values: Float64[np.ndarray, " pairs"] | Bool[np.ndarray, " pairs"],
    weights: Float64[np.ndarray, " pairs"],
) -> float:
    return float(np.average(values, weights=weights))


def _explained(pairs: _Pairs) -> float:
    """R² through 0: a pair has no direction but the one that its labels give."""
    w, x, y = pairs.weights, pairs.lengths, pairs.rewards
    of_lengths, of_rewards = np.sum(w * x * x), np.sum(w * y * y)
    if not of_lengths or not of_rewards:
        return 0.0
    return float(np.sum(w * x * y) ** 2 / (of_lengths * of_rewards))
