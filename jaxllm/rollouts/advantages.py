"""How much better than expected an action was: of single tokens, and of whole responses in groups.

All of a rollout is seen here at once, because what follows couples its rows. Arrays [rows, seq]
have a response to a row, and stand at the place that predicts a token: the action.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EPS = 1e-8
"""Beside a variance, as in the code of Ziegler et al. 2019."""
_GROUP_EPS = 1e-6
"""Beside the standard deviation of a group."""

Tokens = Float[Array, "rows seq"]
Mask = Bool[Array, "rows seq"]
Responses = Float[Array, " rows"]


def gae(rewards: Tokens, values: Tokens, steps: Mask, gamma: float, lam: float) -> Tokens:
    """Generalised advantage estimates (Schulman et al. 2015, https://arxiv.org/abs/1506.02438).

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γ λ A_{t+1}, both 0 after the last step of a row. The
    returns that values are to learn are A + V.

    Args:
        rewards: of each step.
        values: of the state before each step.
        steps: where a step is; places between steps are passed over.
        gamma: γ, by which what comes a step later counts less.
        lam: λ, 0 trusts the values, 1 the rewards.
    """

    def back(
        later: tuple[Responses, Responses], place: tuple[Responses, Responses, Bool[Array, " rows"]]
    ) -> tuple[tuple[Responses, Responses], Responses]:
        next_advantage, next_value = later
        reward, value, step = place
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        later = jnp.where(step, advantage, next_advantage), jnp.where(step, value, next_value)
        return later, jnp.where(step, advantage, 0.0)

    nothing = jnp.zeros(len(rewards), jnp.float32)
    by_place = rewards.T, values.T, steps.T
    _, found = jax.lax.scan(back, (nothing, nothing), by_place, reverse=True)
    return jnp.moveaxis(found, 0, 1)


def returns_to_go(rewards: Tokens, steps: Mask, gamma: float) -> Tokens:
    """Σ γᵏ of the rewards from each step on."""
    return gae(rewards, jnp.zeros_like(rewards), steps, gamma, 1.0)


def whitened(values: Tokens, where: Mask, keep_mean: bool = False) -> Tokens:
    """Values of variance 1 and mean 0, of all places meant at once; 0 elsewhere, and where all of
    them are the same.

    Args:
        values: of each place.
        where: which places are meant.
        keep_mean: leave the mean as it was, as rewards are whitened.
    """
    count = jnp.maximum(jnp.sum(where), 1)
    mean = jnp.sum(jnp.where(where, values, 0.0)) / count
    # The mean of values that are all the same may be another one, by rounding.
    differ = jnp.max(values, initial=-jnp.inf, where=where) > jnp.min(
        values, initial=jnp.inf, where=where
    )
    apart = jnp.where(where & differ, values - mean, 0.0)
    scaled = apart * jax.lax.rsqrt(jnp.sum(jnp.square(apart)) / count + _EPS)
    return jnp.where(where, scaled + mean, 0.0) if keep_mean else scaled


def group_advantages(scores: Responses, group_size: int, divide_by_std: bool) -> Responses:
    """Scores less the mean of their group: the responses to one prompt, which follow each other.
    Where those are all the same it is 0.

    Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300; without the division, Liu et
    al. 2025, https://arxiv.org/abs/2503.20783. The standard deviation is that of a sample (n - 1).
    """
    groups = scores.reshape(-1, group_size)
    # The mean of scores that are all the same may be another one, by rounding.
    differ = jnp.ptp(groups, axis=1, keepdims=True) > 0
    apart = jnp.where(differ, groups - jnp.mean(groups, axis=1, keepdims=True), 0.0)
    if divide_by_std:
        apart /= jnp.std(groups, axis=1, ddof=1, keepdims=True) + _GROUP_EPS
    return apart.reshape(-1)


def leave_one_out(scores: Responses, group_size: int) -> Responses:
    """Scores less the mean of the others of their group (RLOO: Ahmadian et al. 2024, section 3.3,
    https://arxiv.org/abs/2402.14740)."""
    return group_advantages(scores, group_size, False) * (group_size / (group_size - 1))


def has_spread(scores: Responses, group_size: int) -> Bool[Array, " rows"]:
    """Whether the scores of a response's group differ, so that there is something to learn (the
    dynamic sampling of Yu et al. 2025, section 3.2, https://arxiv.org/abs/2503.14476)."""
    groups = scores.reshape(-1, group_size)
    spread = jnp.max(groups, axis=1) > jnp.min(groups, axis=1)
    return jnp.repeat(spread, group_size, total_repeat_length=len(scores))


def explained_variance(values: Tokens, returns: Tokens, where: Mask) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns): 1 where values foretell returns, 0 where they are
    no better than a constant, and where there is nothing to foretell, as all returns are alike."""

    def variance(x: Tokens) -> Float[Array, ""]:
        count = jnp.maximum(jnp.sum(where), 1)
        mean = jnp.sum(jnp.where(where, x, 0.0)) / count
        return jnp.sum(jnp.where(where, jnp.square(x - mean), 0.0)) / count

    of_returns = variance(returns)
    found = 1 - variance(returns - values) / jnp.maximum(of_returns, _EPS)
    return jnp.where(of_returns > _EPS, found, 0.0)


def adapted_kl_coefficient(
    coefficient: Float[Array, ""],
    kl: Float[Array, ""],
    responses: int,
    target: float,
    horizon: float,
) -> Float[Array, ""]:
    """The coefficient of the next rollout, which leads the KL divergence towards a target.

    β ← β (1 + n/h · clip(KL / target - 1, ±0.2)) (Ziegler et al. 2019, section 2.2,
    https://arxiv.org/abs/1909.08593).

    Args:
        coefficient: β of this rollout.
        kl: the mean over its responses of the divergence of the whole response.
        responses: n, how many it has.
        target: what the divergence is to be.
        horizon: h, in responses, over which β changes.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * responses / horizon)
