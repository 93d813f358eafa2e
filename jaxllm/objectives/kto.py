"""KTO: the policy learns from single responses, each of them good or bad.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. With r(y) = log π(y) - log π_ref(y), both
summed over the tokens of a response, the loss of one is

    λ_D (1 - σ(β (r(y) - z)))     if it is good
    λ_U (1 - σ(β (z - r(y))))     if it is bad

and the reference point z = max(0, E r(y')) is of responses y' that belong to other prompts: how far
the policy has come from the reference anyhow. It is of a whole batch, and not differentiated; so it
is computed where the batch is made, by `with_reference_point`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.dpo import TERM, DpoLossConfig, response_log_probs
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.responses import at_ends, response_sums
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.sharding.mesh import in_micro_batches

POINT = "reference_point"
"""Name of z in a batch: float32 [batch, seq], everywhere the same."""


def kto(
    model: TransformerConfig, config: DpoLossConfig, reference: Callable[[Params], Params]
) -> Objective:
    """The mean loss of responses.

    A batch is as for `objectives.dpo.dpo`, with one response to a ranking, whose score is 1 if it
    is good and 0 if it is bad, and with `reference_point`. Metrics: `loss`; `accuracy`, the share
    of responses that the policy has moved as it should, beyond z; `better` and `worse`, the mean
    β (log π - log π_ref) of good and bad ones; `reference_point`, z; `log_ratio` and `log_prob`
    as there.

    Args:
        model: the policy's.
        config: with `loss` `kto`.
        reference: the parameters of the reference, of all.
    """

    def weights(batch: Batch) -> Sums:
        found = {TERM: jnp.sum(response_sums(batch["loss_weights"], batch) > 0, dtype=jnp.float32)}
        return found | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        del row_keys  # nothing is dropped: the reference drops nothing either
        params = trees.merge(params, frozen)
        policy, output = response_log_probs(model, params, batch)
        of_reference, _ = response_log_probs(model, reference(params), batch)
        ratio = policy - jax.lax.stop_gradient(of_reference)
        lengths = response_sums(batch["loss_weights"], batch)
        there = (lengths > 0).astype(jnp.float32)
        good = there * (at_ends(batch["scores"], batch) > 0)
        point = batch[POINT][:, :1]
        moved = config.beta * (ratio - point) * (2 * good - 1)
        factor = jnp.where(good > 0, config.desirable, config.undesirable)
        loss = jnp.sum(there * factor * jax.nn.sigmoid(-moved))
        right = jnp.where(moved == 0, 0.5, (moved > 0).astype(jnp.float32))
        count, tokens, bad = jnp.sum(there), jnp.sum(lengths), there - good
        metrics: Metrics = {
            "loss": (loss, count),
            "accuracy": (jnp.sum(there * right), count),
            "better": (config.beta * jnp.sum(good * ratio), jnp.sum(good)),
            "worse": (config.beta * jnp.sum(bad * ratio), jnp.sum(bad)),
            POINT: (jnp.sum(there * point), count),
            "log_prob": (jnp.sum(policy), tokens),
            "log_ratio": (jnp.sum(ratio), tokens),
        }
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return {TERM: loss} | router_terms, metrics | router_metrics

    return Objective({TERM: 1.0} | router_coefficients(model), weights, sums)


def with_reference_point(
    model: TransformerConfig,
    reference: Callable[[Params], Params],
    micro_batches: int,
    sharding: jax.sharding.Sharding,
) -> Callable[[Params, Params, Batch], Batch]:
    """What adds `reference_point` to a batch: `(params, frozen, batch) -> batch`.

    Args:
        model: the policy's.
        reference: the parameters of the reference, of all.
        micro_batches: into how many parts a batch is cut.
        sharding: how a batch lies on devices.
    """

    def point(params: Params, frozen: Params, batch: Batch) -> Float[Array, "batch seq"]:
        params = trees.merge(params, frozen)

        def moved(rows: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
            rows = mismatched(rows)
            policy, _ = response_log_probs(model, params, rows)
            of_reference, _ = response_log_probs(model, reference(params), rows)
            there = response_sums(rows["loss_weights"], rows) > 0
            return (
                jnp.sum(jnp.where(there, policy - of_reference, 0.0)),
                jnp.sum(there, dtype=jnp.float32),
            )

        parts = {name: in_micro_batches(array, micro_batches) for name, array in batch.items()}
        total, count = (jnp.sum(found) for found in jax.lax.map(moved, parts))
        mean = total / jnp.maximum(count, 1.0)
        return jnp.broadcast_to(jnp.maximum(mean, 0.0), batch["tokens"].shape)

    jitted = jax.jit(point, out_shardings=sharding)

    def complete(params: Params, frozen: Params, batch: Batch) -> Batch:
        return {**batch, POINT: jitted(params, frozen, batch)}

    return complete


def mismatched(batch: Batch) -> Batch:
    """The rows with each prompt before the response to the next prompt of its row, the last one
    before the first; of a row with one prompt alone nothing is learnt."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    count = jnp.max(segments, axis=1, keepdims=True)
    learnt = batch["loss_weights"] > 0
    answers = _before(learnt, False) & (_before(segments, 0) == segments)
    moved = jnp.where(answers, (segments - 2) % jnp.maximum(count, 1) + 1, segments)
    # What is padding stays at the end.
    order = jnp.argsort(jnp.where(segments == 0, 4 * index.shape[1], 2 * moved + answers), axis=1)
    tokens, segments, answers = (
        jnp.take_along_axis(x, order, axis=1)
        for x in (tokens, jnp.where(segments == 0, 0, moved), answers)
    )
    begins = jnp.where(_before(segments, 0) != segments, index, 0)
    predicted = _behind(answers, False) & (_behind(segments, 0) == segments) & (count > 1)
    return {
        "tokens": tokens,
        "targets": _behind(tokens, 0),
        "positions": index - jax.lax.cummax(begins, axis=1),
        "segment_ids": segments,
        "loss_weights": predicted.astype(jnp.float32),
    }


def _before(x: Array, fill: int | bool) -> Array:
    """What stands one place before."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)


def _behind(x: Array, fill: int | bool) -> Array:
    """What stands one place behind."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
