"""PPO: a policy and a value function learn from the same rollouts.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347, of language as Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, and Stiennon et al. 2020, https://arxiv.org/abs/2009.01325. To the
surrogate of `objectives.policy_gradient` comes, of the value V of a state with the return R,

    value    ½ max((V - R)², (clip(V, V_old - c, V_old + c) - R)²)

A batch is as there, with `returns` and `old_values` at the places of `value_weights`: the actions,
and the state that an end leads to.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.head import head_outputs
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.policy_gradient import PolicyLossConfig, policy_sums, policy_weights
from jaxllm.objectives.responses import learnt_log_probs
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.ops.vocabulary import TokenLogProbs

POLICY_TREE, VALUE_TREE = "policy", "value"
"""Where the parameters of the two models stand, if they are two."""
_TERM = "value"


@dataclasses.dataclass(frozen=True)
class PpoLossConfig(PolicyLossConfig):
    """The surrogate, and the loss of values."""

    value_coefficient: float = 0.1
    """Coefficient of the loss of values (Ziegler et al. 2019)."""
    value_clip: float = 0.2
    """How far from its value at the rollout a value may go and still gain (Ziegler et al. 2019;
    Engstrom et al. 2020, https://arxiv.org/abs/2005.12729); 0: as far as it may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.value_coefficient < float("inf"):
            raise ValueError("value_coefficient: must be positive")
        if not 0 <= self.value_clip < float("inf"):
            raise ValueError("value_clip: must not be negative")


def ppo(
    policy: TransformerConfig,
    value: TransformerConfig | None,
    config: PpoLossConfig,
    temperature: float,
    most: int,
) -> Objective:
    """The loss of both; metrics beside those of `policy_sums`: `value_loss`, `value` and
    `value_clip_fraction`, the share of states whose gradient the clip takes away.

    Args:
        policy: with a head of one output where `value` is None.
        value: with a head of one output; its parameters stand below `value/`, and those of the
            policy below `policy/`. None: both are one trunk with two heads.
        config: of the loss.
        temperature: divides the policy's logits, as it did where responses were drawn.
        most: actions of a response at most.
    """

    def weights(batch: Batch) -> Sums:
        values = {_TERM: jnp.sum(batch["value_weights"])}
        return policy_weights(config, batch) | values | router_weights(policy, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        del row_keys  # nothing is dropped: the rollout drops nothing either
        params = trees.merge(params, frozen)
        scores, values, output = scores_and_values(policy, value, params, batch, temperature)
        terms, metrics = policy_sums(config, scores, batch, most)
        value_terms, value_metrics = _value_sums(config, values, batch)
        router_terms, router_metrics = router_sums(policy, output.router, batch)
        return terms | value_terms | router_terms, metrics | value_metrics | router_metrics

    coefficients = config.coefficients | {_TERM: config.value_coefficient}
    return Objective(coefficients | router_coefficients(policy), weights, sums)


def scores_and_values(
    policy: TransformerConfig,
    value: TransformerConfig | None,
    params: Params,
    batch: Batch,
    temperature: float,
) -> tuple[TokenLogProbs, Float[Array, "batch seq"], Output]:
    """log π of the actions, the value of each state, and the policy's forward pass; see `ppo`."""
    if value is None:
        scores, output = learnt_log_probs(policy, params, batch, temperature)
        found = head_outputs(policy, params, output.hidden, batch["positions"])
        return scores, found[..., 0], output
    scores, output = learnt_log_probs(policy, params[POLICY_TREE], batch, temperature)
    return scores, state_values(value, params[VALUE_TREE], batch), output


def state_values(
    model: TransformerConfig, params: Params, batch: Batch
) -> Float[Array, "batch seq"]:
    """The value of the state that each token leads to."""
    output = Transformer(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    assert isinstance(output, Output)
    return head_outputs(model, params, output.hidden, batch["positions"])[..., 0]


def _value_sums(
    config: PpoLossConfig, values: Float[Array, "batch seq"], batch: Batch
) -> tuple[Sums, Metrics]:
    states, returns, old = (batch[name] for name in ("value_weights", "returns", "old_values"))
    squared = jnp.square(values - returns)
    losses, clipped = squared, jnp.zeros_like(squared)
    if config.value_clip:
        change = values - old
        near = old + jnp.clip(change, -config.value_clip, config.value_clip)
        losses = jnp.maximum(squared, jnp.square(near - returns))
        # Of a change that is not clipped too, rounding may make the one larger than the other.
        clipped = ((losses > squared) & (jnp.abs(change) > config.value_clip)).astype(jnp.float32)
    total = jnp.sum(states)
    loss = 0.5 * jnp.sum(states * losses)
    metrics: Metrics = {
        "value_loss": (loss, total),
        "value": (jnp.sum(states * values), total),
        "value_clip_fraction": (jnp.sum(states * clipped), total),
    }
    return {_TERM: loss}, metrics
