"""Responses in rows: what is summed over each, and pairs of a better and a worse one.

A row holds whole rankings: its segments are responses, each behind its prompt, and those to the
same prompt stand beside each other (`data/rankings.py`). So nothing couples rows.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer, output_head
from jaxllm.objectives.objective import Batch, Params
from jaxllm.ops.vocabulary import TokenLogProbs, token_log_probs


class Pairs(NamedTuple):
    """Pairs of responses to the same prompt of which one has the higher score.

    The pair (lag, n) is of response n and the one that stands lag + 1 behind it.
    """

    weights: Float[Array, "batch lags responses"]
    """1 / pairs of the ranking, so that each ranking counts once; 0 where there is no pair."""
    signs: Float[Array, "batch lags responses"]
    """1 where the first is the better one, -1 where the second is; 0: there is no pair."""

    def better(self, values: Float[Array, "batch responses"]) -> Float[Array, "batch lags n"]:
        """What the better response of each pair has."""
        return jnp.where(self.signs < 0, self._behind(values), values[:, None])

    def worse(self, values: Float[Array, "batch responses"]) -> Float[Array, "batch lags n"]:
        """What the worse one has."""
        return jnp.where(self.signs < 0, values[:, None], self._behind(values))

    def difference(self, values: Float[Array, "batch responses"]) -> Float[Array, "batch lags n"]:
        """Better less worse."""
        return self.better(values) - self.worse(values)

    def total(self, of_pairs: Float[Array, "batch lags responses"]) -> Float[Array, ""]:
        """The weighed sum over all pairs."""
        # Where there is no pair stands anything, NaN too.
        return jnp.sum(self.weights * jnp.where(self.signs == 0, 0.0, of_pairs))

    def _behind(self, values: Shaped[Array, "batch responses"]) -> Shaped[Array, "batch lags n"]:
        return behind(values, self.signs.shape[1])


def pairs_of(batch: Batch, largest: int) -> Pairs:
    """The pairs of a batch's rankings.

    Args:
        batch: with `segment_ids`, `ranking_ids` and `scores` [batch, seq].
        largest: responses of a ranking at most.
    """
    ranking = at_ends(batch["ranking_ids"], batch)
    score = at_ends(batch["scores"], batch)
    lags = largest - 1
    same = (ranking[:, None] > 0) & (ranking[:, None] == behind(ranking, lags))
    signs = jnp.where(same, jnp.sign(score[:, None] - behind(score, lags)), 0.0)
    found = jnp.abs(signs)
    # By ranking, and from there back to its pairs, which all begin at one of its responses.
    counts = _sums(jnp.sum(found, axis=1), ranking)
    count = jnp.take_along_axis(counts, ranking, axis=1)[:, None]
    return Pairs(found / jnp.maximum(count, 1.0), signs)


def best_of(batch: Batch) -> Bool[Array, "batch responses"]:
    """Which responses have the highest score of their ranking."""
    ranking = at_ends(batch["ranking_ids"], batch)
    score = at_ends(batch["scores"], batch)
    highest = jax.vmap(lambda s, r: jax.ops.segment_max(s, r, s.shape[0] + 1))(score, ranking)
    return (ranking > 0) & (score == jnp.take_along_axis(highest, ranking, axis=1))


def response_sums(
    values: Shaped[Array, "batch seq"], batch: Batch
) -> Shaped[Array, "batch responses"]:
    """The sum over the tokens of each response, and its prompt, in the order of the row; a row has
    as many responses at most as tokens."""
    return _sums(values, batch["segment_ids"])[:, 1:]


def response_log_probs(
    model: TransformerConfig, params: Params, batch: Batch
) -> tuple[Float[Array, "batch responses"], Output]:
    """log π(y | x) of each response of a row, in order, and the forward pass it was read of."""
    scores, output = learnt_log_probs(model, params, batch)
    return response_sums(batch["loss_weights"] * scores.log_prob, batch), output


def learnt_log_probs(
    model: TransformerConfig, params: Params, batch: Batch, temperature: float = 1.0
) -> tuple[TokenLogProbs, Output]:
    """log π of the tokens that are learnt, elsewhere anything finite, and the forward pass it was
    read of; `temperature` divides the logits."""
    output = Transformer(model).apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
    )
    assert isinstance(output, Output)
    head = dataclasses.replace(output_head(model, params), temperature=temperature)
    needed = batch["loss_weights"] > 0
    return token_log_probs(output.hidden, head, batch["targets"], needed=needed), output


def at_tokens(
    values: Shaped[Array, "batch responses"], segment_ids: Int[Array, "batch seq"]
) -> Shaped[Array, "batch seq"]:
    """At each token what its response has; at padding anything."""
    return jnp.take_along_axis(values, jnp.maximum(segment_ids - 1, 0), axis=1)


def at_ends(values: Shaped[Array, "batch seq"], batch: Batch) -> Shaped[Array, "batch responses"]:
    """What stands at the last token of each response."""
    segments = batch["segment_ids"]
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    ends = (segments > 0) & (segments != following)
    return response_sums(jnp.where(ends, values, jnp.zeros((), values.dtype)), batch)


def behind(
    values: Shaped[Array, "batch responses"], lags: int
) -> Shaped[Array, "batch lags responses"]:
    """For each response the values of those that stand 1, 2, … behind it; 0 behind the last."""
    seq = values.shape[1]
    padded = jnp.pad(values, ((0, 0), (0, lags)))
    return jnp.stack([padded[:, lag : lag + seq] for lag in range(1, lags + 1)], axis=1)


def _sums(
    values: Shaped[Array, "batch seq"], numbers: Int[Array, "batch seq"]
) -> Shaped[Array, "batch numbers"]:
    """Sums of the values of each number, row by row; of numbers up to the length of a row."""
    return jax.vmap(lambda v, n: jax.ops.segment_sum(v, n, v.shape[0] + 1))(values, numbers)
