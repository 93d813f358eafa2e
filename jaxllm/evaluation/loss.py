"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxllm.data.store import TokenStore
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params


class LossEvaluator:
    """Averages an objective's metrics over evaluation batches; compiled once."""

    def __init__(self, objective: Objective) -> None:
        def metrics(params: Params, batch: Batch, frozen: Params) -> Metrics:
            return objective.sums(params, batch, frozen, None)[1]

        self._metrics = jax.jit(metrics)

    def __call__(
        self, params: Params, frozen: Params, batches: Iterable[Batch]
    ) -> dict[str, tuple[float, float]]:
        """(mean, weight) of each metric over all batches, each weighed by what it counts.

        Raises:
            ValueError: there are no batches.
        """
        total: Metrics | None = None
        for batch in batches:
            metrics = self._metrics(params, batch, frozen)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        if total is None:
            raise ValueError("there are no evaluation batches")
        return {
            name: (float(value) / float(weight) if weight else math.nan, float(weight))
            for name, (value, weight) in jax.device_get(total).items()
        }


def text_scores(loss: float, store: TokenStore) -> dict[str, float]:
    """Scores of a mean loss, in nats per predicted token, over the text of a store.

    Bits per byte = loss · tokens / (ln 2 · bytes) compares models of different tokenizers: the
    tokens are all that are predicted (every one but the first of each document, its end
    included), the bytes those of the text in UTF-8.
    """
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": loss * store.num_predicted / (math.log(2) * store.num_bytes),
    }
