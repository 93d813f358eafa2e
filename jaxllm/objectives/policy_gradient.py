"""What a policy learns from its own responses: the clipped surrogate of policy gradients.

With ρ = π(a) / π_old(a) of an action, a token of a response, and its advantage A, the loss is

    max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))      Schulman et al. 2017, equation 7,
                                                      https://arxiv.org/abs/1707.06347

π_old is the policy at the time of the rollout, as the learner computes it. Beside it may stand

    kl       π_ref/π - log(π_ref/π) - 1               (k3: http://joschu.net/blog/kl-approx.html),
                                                      of which GRPO takes β times
    entropy  of π, which a bonus keeps up

A batch has a response to a segment, and what next-token prediction has, where `loss_weights` mark
the actions. Beside it `advantages`, `sampler_log_probs`, `old_log_probs` (none: every update is on
policy, ρ is 1) and `reference_log_probs` (where the loss has `kl`), float32 [batch, seq], at the
place of an action.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.objectives.objective import Batch, Memory, Metrics, Remember, Sums
from jaxllm.objectives.responses import at_tokens, response_sums
from jaxllm.ops.vocabulary import TokenLogProbs

GOING_ON = "going_on"
"""Of an algorithm's memory: 1, or 0 where the rest of a rollout's updates is left out."""
POLICY, KL, ENTROPY = "policy", "kl", "entropy"
NORMALISATIONS = ("token", "response", "constant")
RATIOS = ("token", "response")


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The surrogate, what stands beside it, and what it is averaged over."""

    clip_low: float = 0.2
    """ε_low: below 1 - ε_low a ratio of probabilities is not lowered further,"""
    clip_high: float = 0.2
    """and above 1 + ε_high not raised; more than ε_low leaves room to unlikely tokens (0.28: Yu et
    al. 2025, section 3.1, https://arxiv.org/abs/2503.14476)."""
    ratio: str = "token"
    """`token`: each action has its ρ; `response`: all of a response have one, the geometric mean
    (GSPO: Zheng et al. 2025, https://arxiv.org/abs/2507.18071), which wants a clip of some 3e-4."""
    normalisation: str = "token"
    """What losses are averaged over: `token`, all actions alike (DAPO: Yu et al. 2025, section
    3.3); `response`, the actions of each response and then responses (GRPO: Shao et al. 2024);
    `constant`, the sum over a response's actions divided by `max_new_tokens`, and then responses
    (Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783)."""
    kl_loss: float = 0.0
    """Coefficient of the divergence from the reference in the loss."""
    entropy_bonus: float = 0.0
    """Coefficient of the entropy (Williams and Peng 1991; Schulman et al. 2017, equation 9)."""

    def __post_init__(self) -> None:
        for name in ("kl_loss", "entropy_bonus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must not be negative")
        if not 0 < self.clip_low <= 1 or not 0 < self.clip_high < float("inf"):
            raise ValueError("clip_low, clip_high: must be positive, and clip_low at most 1")
        for name, known in (("ratio", RATIOS), ("normalisation", NORMALISATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: must be one of {', '.join(known)}; was {getattr(self, name)!r}"
                )

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the terms of the loss."""
        beside = {KL: self.kl_loss, ENTROPY: -self.entropy_bonus}
        return {POLICY: 1.0} | {term: value for term, value in beside.items() if value}


def policy_weights(config: PolicyLossConfig, batch: Batch) -> Sums:
    """The weight of each term: actions, or responses that have any."""
    actions = batch["loss_weights"]
    if config.normalisation == "token":
        total = jnp.sum(actions)
    else:
        total = jnp.sum(response_sums(actions, batch) > 0).astype(jnp.float32)
    return dict.fromkeys(config.coefficients, total)


def policy_sums(
    config: PolicyLossConfig, scores: TokenLogProbs, batch: Batch, most: int
) -> tuple[Sums, Metrics]:
    """The sum of each term, and the metrics, each a mean over actions.

    These are `loss`, the surrogate alone; `entropy`; `ratio` and `ratio_variance`, the mean of ρ
    and of (ρ - 1)²; `clip_fraction`, the share of actions whose gradient the clip takes away;
    `approx_kl`, the mean of ρ - 1 - log ρ, KL(π_old ‖ π) of an action; and
    `rollout/logprob_gap`, the mean |log π_old - log π| where π is the sampler's: both compute the
    same model.

    Args:
        config: of the loss.
        scores: of the policy, at the temperature of the rollout.
        batch: as above.
        most: actions of a response at most.
    """
    actions = batch["loss_weights"]
    log_ratio, ratio = _ratios(config, scores.log_prob, batch)
    advantages = jnp.where(actions > 0, batch["advantages"], 0.0)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    terms = {POLICY: losses, ENTROPY: scores.entropy}
    if config.kl_loss:
        apart = jnp.where(actions > 0, batch["reference_log_probs"] - scores.log_prob, 0.0)
        terms[KL] = jnp.expm1(apart) - apart
    counted = _counted(config, batch, most)
    old = batch.get("old_log_probs", jax.lax.stop_gradient(scores.log_prob))
    sums = {term: jnp.sum(counted * terms[term]) for term in config.coefficients}
    ratio = jax.lax.stop_gradient(ratio)
    measured = {
        "loss": losses,
        "ratio": ratio,
        "ratio_variance": jnp.square(ratio - 1),
        "clip_fraction": (-advantages * clipped > -advantages * ratio).astype(jnp.float32),
        "approx_kl": ratio - 1 - log_ratio,
        ENTROPY: scores.entropy,
        "rollout/logprob_gap": jnp.abs(old - batch["sampler_log_probs"]),
    }
    if config.kl_loss:
        measured[KL] = terms[KL]
    total = jnp.sum(actions)
    # Elsewhere stands anything.
    return sums, {
        name: (jnp.sum(jnp.where(actions > 0, value, 0.0)), total)
        for name, value in measured.items()
    }


def cut_short(max_kl: float) -> Remember:
    """Ends the updates of a rollout after one that finds `approx_kl` above `max_kl`."""

    def remember(memory: Memory, metrics: Mapping[str, Float[Array, ""]]) -> Memory:
        near = (metrics["approx_kl"] <= max_kl).astype(jnp.float32)
        return {**memory, GOING_ON: memory[GOING_ON] * near}

    return remember


def _ratios(
    config: PolicyLossConfig, log_probs: Float[Array, "batch seq"], batch: Batch
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """log ρ and ρ of each action; elsewhere 0 and 1."""
    actions = batch["loss_weights"]
    now = jax.lax.stop_gradient(log_probs)
    log_ratio = jnp.where(actions > 0, log_probs - batch.get("old_log_probs", now), 0.0)
    if config.ratio == "response":
        lengths = jnp.maximum(response_sums(actions, batch), 1.0)
        mean = at_tokens(response_sums(log_ratio, batch) / lengths, batch["segment_ids"])
        log_ratio = jnp.where(actions > 0, mean, 0.0)
    return log_ratio, jnp.exp(log_ratio)


def _counted(config: PolicyLossConfig, batch: Batch, most: int) -> Float[Array, "batch seq"]:
    """What each action counts."""
    actions = batch["loss_weights"]
    if config.normalisation == "token":
        return actions
    if config.normalisation == "constant":
        return actions / most
    lengths = jnp.maximum(response_sums(actions, batch), 1.0)
    return actions / at_tokens(lengths, batch["segment_ids"])
