"""KTO: the policy learns from single responses, each of them good or bad.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. With r(y) = log π(y) - log π_ref(y), both
summed over the tokens of a response, the loss of one is

    λ_D (1 - σ(β (r(y) - z)))     if it is good
    λ_U (1 - σ(β (z - r(y))))     if it is bad

and the reference point z = max(0, E r(y')) is of responses y' that belong to other prompts: how far
the policy has come from the reference anyhow. It is of a whole batch, and not differentiated, so it
is computed before the step, by `ReferencePoint`.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.dpo import TERM, DpoLossConfig
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.responses import (
    at_ends,
    at_tokens,
    response_log_probs,
    response_sums,
)
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.sharding.mesh import in_micro_batches

POINT = "reference_point"
"""Name of z in a batch: float32 [batch, seq], everywhere the same."""


class ReferencePoint:
    """Completes batches with z; the mesh must be set."""

    def __init__(
        self,
        model: TransformerConfig,
        reference: Callable[[Params], Params],
        sharding: jax.sharding.Sharding,
        micro_batches: int = 1,
    ) -> None:
        """Args:
        model: the policy's.
        reference: the parameters of the reference, of all.
        sharding: how a batch lies on devices.
        micro_batches: into how many parts a training batch is cut.
        """

        def moved(params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
            """The sum of r over mismatched responses, and how many there are."""
            rows = mismatched(batch)
            policy, _ = response_log_probs(model, params, rows)
            of_reference, _ = response_log_probs(model, reference(params), rows)
            there = response_sums(rows["loss_weights"], rows) > 0
            ratio = jnp.where(there, policy - of_reference, 0.0)
            return jnp.sum(ratio), jnp.sum(there, dtype=jnp.float32)

        def of_batch(params: Params, frozen: Params, batch: Batch) -> Float[Array, "batch seq"]:
            params = trees.merge(params, frozen)
            parts = {name: in_micro_batches(array, micro_batches) for name, array in batch.items()}
            total, count = (
                jnp.sum(found) for found in jax.lax.map(lambda rows: moved(params, rows), parts)
            )
            return _spread(total, count, batch)

        self._of_batch = jax.jit(of_batch, out_shardings=sharding)
        self._moved = jax.jit(
            lambda params, frozen, batch: moved(trees.merge(params, frozen), batch)
        )
        self._spread = jax.jit(_spread, out_shardings=sharding)

    def of_batch(self, params: Params, frozen: Params, batch: Batch) -> Batch:
        """A training batch with its own z."""
        return {**batch, POINT: self._of_batch(params, frozen, batch)}

    def of_all(self, params: Params, frozen: Params, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Evaluation batches, gone through twice, with the one z of all of them."""
        total, count = jnp.zeros(()), jnp.zeros(())
        for batch in batches:
            more, of_more = self._moved(params, frozen, batch)
            total, count = total + more, count + of_more
        for batch in batches:
            yield {**batch, POINT: self._spread(total, count, batch)}


def _spread(
    total: Float[Array, ""], count: Float[Array, ""], batch: Batch
) -> Float[Array, "batch seq"]:
    """z, everywhere in a batch."""
    point = jnp.maximum(total / jnp.maximum(count, 1.0), 0.0)
    return jnp.broadcast_to(point, batch["tokens"].shape)


def kto(
    model: TransformerConfig,
    config: DpoLossConfig,
    reference: Callable[[Params], Params],
    point: ReferencePoint,
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
        point: completes batches.
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
        z = batch[POINT][:, :1]
        moved = config.beta * (ratio - z) * (2 * good - 1)
        factor = jnp.where(good > 0, config.desirable, config.undesirable)
        loss = jnp.sum(there * factor * jax.nn.sigmoid(-moved))
        right = jnp.where(moved == 0, 0.5, (moved > 0).astype(jnp.float32))
        count, tokens, bad = jnp.sum(there), jnp.sum(lengths), there - good
        metrics: Metrics = {
            "loss": (loss, count),
            "accuracy": (jnp.sum(there * right), count),
            "better": (config.beta * jnp.sum(good * ratio), jnp.sum(good)),
            "worse": (config.beta * jnp.sum(bad * ratio), jnp.sum(bad)),
            POINT: (jnp.sum(there * z), count),
            "log_prob": (jnp.sum(policy), tokens),
            "log_ratio": (jnp.sum(ratio), tokens),
        }
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return {TERM: loss} | router_terms, metrics | router_metrics

    return Objective(
        {TERM: 1.0} | router_coefficients(model), weights, sums, complete=point.of_batch
    )


def mismatched(batch: Batch) -> Batch:
    """The rows with each prompt before the response that follows the next prompt of its row, the
    last one before the first. Learnt is of it what stands behind another prompt than its own: of a
    row with one response, or with several to the same prompt, nothing."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    count = jnp.max(segments, axis=1, keepdims=True)
    answers = _before(batch["loss_weights"] > 0, False) & (_before(segments, 0) == segments)
    moved = jnp.where(answers, (segments - 2) % jnp.maximum(count, 1) + 1, segments)
    prompts = _prompt_hashes(batch, answers)
    apart = at_tokens(prompts, segments) != at_tokens(prompts, moved)
    # What is padding stays at the end.
    order = jnp.argsort(jnp.where(segments == 0, 4 * index.shape[1], 2 * moved + answers), axis=1)
    tokens, segments, learnt = (
        jnp.take_along_axis(x, order, axis=1)
        for x in (tokens, jnp.where(segments == 0, 0, moved), answers & apart)
    )
    begins = jnp.where(_before(segments, 0) != segments, index, 0)
    predicted = _behind(learnt, False) & (_behind(segments, 0) == segments)
    return {
        "tokens": tokens,
        "targets": _behind(tokens, 0),
        "positions": index - jax.lax.cummax(begins, axis=1),
        "segment_ids": segments,
        "loss_weights": predicted.astype(jnp.float32),
    }


def _prompt_hashes(
    batch: Batch, answers: Bool[Array, "batch seq"]
) -> UInt32[Array, "batch responses"]:
    """A number of each segment's prompt: equal prompts have equal ones, and others hardly ever."""
    tokens, positions = (batch[name].astype(jnp.uint32) for name in ("tokens", "positions"))
    values = (tokens + 1) * jnp.power(jnp.uint32(2_654_435_761), positions)  # modulo 2³²
    return response_sums(jnp.where(answers, jnp.uint32(0), values), batch)


def _before(x: Array, fill: int | bool) -> Array:
    """What stands one place before."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)


def _behind(x: Array, fill: int | bool) -> Array:
    """What stands one place behind."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
