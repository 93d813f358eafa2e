"""From what responses are worth to what is learnt of each action: by groups, or by values."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.objectives.objective import Batch
from jaxllm.rollouts.advantages import (
    explained_variance,
    gae,
    group_advantages,
    has_spread,
    leave_one_out,
    returns_to_go,
    whitened,
)

ESTIMATORS = ("group", "leave_one_out", "global")

Scalars = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """How the responses to one prompt are compared."""

    advantages: str = "group"
    """`group`: a response's score less the mean of its group (GRPO: Shao et al. 2024,
    https://arxiv.org/abs/2402.03300); `leave_one_out`: less the mean of the others (RLOO: Ahmadian
    et al. 2024, https://arxiv.org/abs/2402.14740); `global`: what is still to come of rewards at
    each action, whitened over the rollout, in groups less the group's mean (REINFORCE++: Hu et al.
    2025, https://arxiv.org/abs/2501.03262)."""
    divide_by_std: bool = True
    """Of `group`: whether to divide by the standard deviation of the group's scores."""
    filter_groups: bool = False
    """Leave out groups whose scores are all the same (Yu et al. 2025, section 3.2,
    https://arxiv.org/abs/2503.14476), so that losses are averaged over the others alone."""
    filter_overlong: bool = False
    """Leave out responses that did not end (section 3.4 there)."""

    def __post_init__(self) -> None:
        if self.advantages not in ESTIMATORS:
            raise ValueError(
                f"advantages: must be one of {', '.join(ESTIMATORS)}; was {self.advantages!r}"
            )


@dataclasses.dataclass(frozen=True)
class GroupEstimator:
    """Advantages of responses within their groups; a response's actions have the same."""

    name = "grpo"

    config: GroupConfig
    group_size: int
    has_reference: bool
    """Whether rows tell of a reference, and of the policy."""
    kept: tuple[str, ...]
    """What the objective asks for beside advantages."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that come to rows."""
        return ("advantages", *self.kept)

    @property
    def told(self) -> tuple[str, ...]:
        """See `source.Estimator`."""
        return ("groups_with_spread", *(_DIVERGENCE if self.has_reference else ()))

    def __call__(
        self,
        rows: Batch,
        scores: Float[Array, " rows"],
        ended: Bool[Array, " rows"],
        kl_coef: Float[Array, ""],
    ) -> tuple[Batch, Scalars]:
        """See `source.Estimator`."""
        actions = rows["loss_weights"] > 0
        config, group = self.config, self.group_size
        ratios = log_ratios(rows) if self.has_reference else jnp.zeros_like(rows["loss_weights"])
        penalties = kl_coef * ratios
        spread = has_spread(scores, group)
        learnt = jnp.ones_like(spread)
        if config.filter_groups:
            learnt &= spread
        if config.filter_overlong:
            learnt &= ended
        if config.advantages == "global":
            apart = group_advantages(scores, group, False) if group > 1 else scores
            rewards = at_last(actions, apart) - penalties
            learnt_from = actions & learnt[:, None]
            advantages = whitened(returns_to_go(rewards, actions, 1.0), learnt_from)
        else:
            totals = scores - jnp.sum(penalties, axis=1)
            if config.advantages == "leave_one_out":
                found = leave_one_out(totals, group)
            else:
                found = group_advantages(totals, group, config.divide_by_std)
            advantages = jnp.where(actions, found[:, None], 0.0)
        found_rows = {
            **rows,
            "advantages": advantages,
            "loss_weights": rows["loss_weights"] * learnt[:, None],
        }
        told = {"groups_with_spread": jnp.mean(spread.astype(jnp.float32))}
        return found_rows, told | (_divergence(ratios, kl_coef) if self.has_reference else {})


@dataclasses.dataclass(frozen=True)
class GaeConfig:
    """How advantages come of rewards and values."""

    gamma: float = 1.0
    """γ: what comes an action later counts so many times as much (Schulman et al. 2015,
    https://arxiv.org/abs/1506.02438, of λ too)."""
    lam: float = 0.95
    """λ: 0 trusts the values, 1 the rewards."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1, over all actions of the rollout (Ziegler et al. 2019, whose code
    whitens both)."""
    whiten_rewards: bool = False
    """To variance 1, their mean kept."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be from 0 to 1")


@dataclasses.dataclass(frozen=True)
class GaeEstimator:
    """Advantages of actions by rewards and values."""

    name = "ppo"

    config: GaeConfig
    has_reference: bool
    """Whether rows tell of a reference."""
    kept: tuple[str, ...]
    """What the objective asks for beside those below."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that come to rows."""
        return ("advantages", "returns", "old_values", "value_weights", *self.kept)

    @property
    def told(self) -> tuple[str, ...]:
        """See `source.Estimator`."""
        return ("return", "explained_variance", *(_DIVERGENCE if self.has_reference else ()))

    def __call__(
        self,
        rows: Batch,
        scores: Float[Array, " rows"],
        ended: Bool[Array, " rows"],
        kl_coef: Float[Array, ""],
    ) -> tuple[Batch, Scalars]:
        """See `source.Estimator`."""
        del ended
        config = self.config
        actions, states = rows["loss_weights"] > 0, rows["value_weights"] > 0
        ratios = log_ratios(rows) if self.has_reference else jnp.zeros_like(rows["loss_weights"])
        # Of a response that has ended that is the state behind its end, whose value is its score.
        rewards = at_last(states, scores) - kl_coef * ratios
        if config.whiten_rewards:
            rewards = whitened(rewards, states, keep_mean=True)
        values = rows["old_values"]
        estimated = gae(rewards, values, states, config.gamma, config.lam)
        returns = jnp.where(states, estimated + values, 0.0)
        advantages = whitened(estimated, actions) if config.whiten_advantages else estimated
        told = {
            "return": _mean(returns, states),
            "explained_variance": explained_variance(values, returns, states),
        }
        found = {**rows, "advantages": advantages, "returns": returns}
        return found, told | (_divergence(ratios, kl_coef) if self.has_reference else {})


def at_last(
    steps: Bool[Array, "rows seq"], scores: Float[Array, " rows"]
) -> Float[Array, "rows seq"]:
    """Each row's score at its last step."""
    still_to_come = jnp.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(steps & (still_to_come == 1), scores[:, None], 0.0)


def log_ratios(rows: Batch) -> Float[Array, "rows seq"]:
    """log π - log π_ref of each action, whose mean under π is KL(π ‖ π_ref) (k1:
    http://joschu.net/blog/kl-approx.html); by what the sampler tells, where the learner's own
    log π is not asked for, as nothing is learnt from these then."""
    own = rows["old_log_probs"] if "old_log_probs" in rows else rows["sampler_log_probs"]
    apart = own - rows["reference_log_probs"]
    return jnp.where(rows["loss_weights"] > 0, apart, 0.0)


_DIVERGENCE = ("kl", "kl_coef")


def _divergence(ratios: Float[Array, "rows seq"], kl_coef: Float[Array, ""]) -> Scalars:
    """The mean over responses of the divergence of the whole response, and β."""
    return {"kl": jnp.mean(jnp.sum(ratios, axis=1)), "kl_coef": kl_coef}


def _mean(values: Float[Array, "rows seq"], where: Bool[Array, "rows seq"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)
