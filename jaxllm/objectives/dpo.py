"""Direct preference optimisation, and what has grown from it: the policy learns from pairs.

With y⁺ the better and y⁻ the worse response to x, log π(y) = Σ log π(yₜ | x, y₍<ₜ₎) over the tokens
of a response, and Δ the difference of y⁺ and y⁻ in log π(y) - log π_ref(y):

    sigmoid  -(1-ε) log σ(β Δ) - ε log σ(-β Δ)       DPO: Rafailov et al. 2023,
             https://arxiv.org/abs/2305.18290; ε > 0, cDPO: Mitchell 2023,
             https://ericmitchell.ai/cdpo.pdf
    ipo      (Δ - 1/(2β))²                           Azar et al. 2023,
             https://arxiv.org/abs/2310.12036
    hinge    max(0, 1 - β Δ)                         Liu et al. 2023, https://arxiv.org/abs/2309.06657
    simpo    -log σ(β (log π(y⁺)/|y⁺| - log π(y⁻)/|y⁻|) - γ)        no reference; Meng et al. 2024,
             https://arxiv.org/abs/2405.14734
    orpo     -β log σ(log odds(y⁺) - log odds(y⁻)), odds(y) = p/(1-p) of p = π(y)^(1/|y|), and
             beside it -log π by token over all best responses of the batch
                                                     no reference; Hong et al. 2024,
             https://arxiv.org/abs/2403.07691

and of single responses, good or bad, `kto` (`objectives.kto`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.responses import (
    Pairs,
    at_ends,
    best_of,
    pairs_of,
    response_log_probs,
    response_sums,
)
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights

LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto")
TERM = "preference"
_LIKELIHOOD = "best_response"
_REFERENCE_FREE = ("simpo", "orpo")
_READ_BY = {
    "label_smoothing": "sigmoid",
    "gamma": "simpo",
    "desirable": "kto",
    "undesirable": "kto",
}
"""Numbers that one loss alone reads."""


@dataclasses.dataclass(frozen=True)
class DpoLossConfig:
    """Which loss, and its numbers."""

    loss: str = "sigmoid"
    """`sigmoid` (DPO), `ipo`, `hinge`, `simpo` or `orpo`; or `kto`, of single responses."""
    beta: float = 0.1
    """How strongly the policy is held to the reference; of `simpo` the scale of rewards (2 to 10
    are usual), of `orpo` the weight of the odds beside the likelihood."""
    label_smoothing: float = 0.0
    """Of `sigmoid`: share of pairs that are taken to be the wrong way round (cDPO)."""
    gamma: float = 0.5
    """Of `simpo`: by how much the better response is to win."""
    desirable: float = 1.0
    """Of `kto`: how much a good response counts,"""
    undesirable: float = 1.0
    """and a bad one; of few good ones make more, so that both count about as much."""
    best_response: float = 0.0
    """Coefficient of the mean -log π of the best responses' tokens beside the loss, which keeps
    them likely; `orpo` has it already."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: must be one of {', '.join(LOSSES)}; was {self.loss!r}")
        if not 0 < self.beta < float("inf"):
            raise ValueError("beta: must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError("label_smoothing: must be in [0, 0.5)")
        if not 0 <= self.gamma < float("inf"):
            raise ValueError("gamma: must not be negative")
        if not 0 <= self.best_response < float("inf"):
            raise ValueError("best_response: must not be negative")
        for name in ("desirable", "undesirable"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must be positive")
        for name, loss in _READ_BY.items():
            default = getattr(type(self), name)
            if self.loss != loss and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: {self.loss} does not read it, but only {loss}; leave it at {default}"
                )
        if self.loss == "simpo" and self.beta < 1:
            raise ValueError(f"beta: {self.beta:g} is too little for simpo; 2 to 10 are usual")
        if self.loss == "orpo" and self.best_response:
            raise ValueError("best_response: orpo has it already; leave it at 0")
        if self.loss == "kto" and self.best_response:
            raise ValueError("best_response: kto does not read it; leave it at 0")

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.loss not in _REFERENCE_FREE

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the terms of the loss."""
        likelihood = 1.0 if self.loss == "orpo" else self.best_response
        weight = self.beta if self.loss == "orpo" else 1.0
        return {TERM: weight} | ({_LIKELIHOOD: likelihood} if likelihood else {})


class _Likelihoods:
    """log π(y) of each response, of a reference too, and the tokens of each."""

    def __init__(
        self,
        policy: Float[Array, "batch responses"],
        reference: Float[Array, "batch responses"],
        lengths: Float[Array, "batch responses"],
    ) -> None:
        self.policy, self.ratio, self.lengths = policy, policy - reference, lengths
        self.mean = policy / jnp.maximum(lengths, 1.0)


def dpo(
    model: TransformerConfig,
    config: DpoLossConfig,
    largest: int,
    reference: Callable[[Params], Params] | None = None,
) -> Objective:
    """The mean over rankings of a loss of pairs (any but `kto`), averaged over a ranking's pairs.

    A batch holds what next-token prediction has, whose `loss_weights` mark the responses' tokens,
    and `ranking_ids` and `scores` (`data/rankings.py`). Metrics: `loss` of pairs; `accuracy`,
    the share of pairs in which the policy has raised the better response further than the worse
    (without reference: likes it better, a token); `margin`, by how much, of β (log π - log π_ref);
    `better` and `worse`, that of each; `log_ratio`, the mean log π - log π_ref of a token of the
    responses; `log_prob`, the mean log π of it.

    Args:
        model: the policy's.
        config: loss and numbers.
        largest: responses of a ranking at most.
        reference: the parameters of the reference, of all; None: where the loss has a reference,
            the batch holds `reference_log_probs`, log π_ref(y) at the last token of each response.
    """

    assert config.loss != "kto", "which is of single responses (objectives.kto)"

    def weights(batch: Batch) -> Sums:
        found = {TERM: jnp.sum(pairs_of(batch, largest).weights)}
        if _LIKELIHOOD in config.coefficients:
            lengths = response_sums(batch["loss_weights"], batch)
            found[_LIKELIHOOD] = jnp.sum(jnp.where(best_of(batch), lengths, 0.0))
        return found | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        del row_keys  # nothing is dropped: the reference drops nothing either
        params = trees.merge(params, frozen)
        policy, output = response_log_probs(model, params, batch)
        if not config.has_reference:
            of_reference = jnp.zeros_like(policy)
        elif reference:
            found, _ = response_log_probs(model, reference(params), batch)
            of_reference = jax.lax.stop_gradient(found)
        else:
            of_reference = at_ends(batch["reference_log_probs"], batch)
        likelihoods = _Likelihoods(
            policy, of_reference, response_sums(batch["loss_weights"], batch)
        )
        pairs = pairs_of(batch, largest)
        losses = _losses(config, pairs, likelihoods)
        terms = {TERM: pairs.total(losses)}
        if _LIKELIHOOD in config.coefficients:
            terms[_LIKELIHOOD] = -jnp.sum(jnp.where(best_of(batch), policy, 0.0))
        metrics = _metrics(config, pairs, losses, likelihoods, batch)
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return terms | router_terms, metrics | router_metrics

    return Objective(config.coefficients | router_coefficients(model), weights, sums)


def _losses(
    config: DpoLossConfig, pairs: Pairs, found: _Likelihoods
) -> Float[Array, "batch lags responses"]:
    """The loss of each pair."""
    if config.loss == "simpo":
        return jax.nn.softplus(config.gamma - config.beta * pairs.difference(found.mean))
    if config.loss == "orpo":
        # log odds = log p - log(1 - p), of log p < 0.
        log_p = jnp.minimum(found.mean, -1e-6)
        return jax.nn.softplus(-pairs.difference(log_p - jnp.log(-jnp.expm1(log_p))))
    margin = pairs.difference(found.ratio)
    if config.loss == "ipo":
        return jnp.square(margin - 0.5 / config.beta)
    if config.loss == "hinge":
        return jax.nn.relu(1 - config.beta * margin)
    share = config.label_smoothing
    return (1 - share) * jax.nn.softplus(-config.beta * margin) + share * jax.nn.softplus(
        config.beta * margin
    )


def _metrics(
    config: DpoLossConfig,
    pairs: Pairs,
    losses: Float[Array, "batch lags responses"],
    found: _Likelihoods,
    batch: Batch,
) -> Metrics:
    rewards = config.beta * (found.ratio if config.has_reference else found.mean)
    margin = pairs.difference(rewards)
    measured = {
        "loss": losses,
        "accuracy": jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32)),
        "margin": margin,
        "better": pairs.better(rewards),
        "worse": pairs.worse(rewards),
    }
    rankings, tokens = jnp.sum(pairs.weights), jnp.sum(batch["loss_weights"])
    metrics: Metrics = {name: (pairs.total(value), rankings) for name, value in measured.items()}
    metrics["log_prob"] = (jnp.sum(found.policy), tokens)
    if config.has_reference:
        metrics["log_ratio"] = (jnp.sum(found.ratio), tokens)
    return metrics
