"""How good a response is: the Bradley-Terry model of which of two is preferred.

The reward is the head's one output at the last token of the response, which has seen all of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output
from jaxllm.objectives.classification import text_outputs
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.responses import at_ends, pairs_of
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights

TERM = "preference"
_CENTRING = "centring"


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """The loss of rewards."""

    margin: float = 0.0
    """How much further apart rewards are to be for each unit that the scores of two responses
    differ by (the margin of Touvron et al. 2023, section 3.2.2, https://arxiv.org/abs/2307.09288);
    0: only their order counts."""
    centring: float = 0.0
    """Coefficient of (r + r')², of the rewards of a pair, which keeps them around 0 (Eisenstein et
    al. 2023, https://arxiv.org/abs/2312.09244); 0.01 is usual."""

    def __post_init__(self) -> None:
        for name in ("margin", "centring"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must not be negative")


def reward(model: TransformerConfig, config: RewardLossConfig, largest: int) -> Objective:
    """The mean over rankings of -log σ(r - r' - m (s - s')), averaged over a ranking's pairs.

    r is the reward and s the score of the better, r' and s' of the worse response (Bradley and
    Terry 1952; of rankings as Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155).
    Metrics: `loss`, the same without margin; `accuracy`, the share of pairs whose better response
    has the higher reward; `reward`, the mean of both; `margin`, the mean of r - r'.

    Args:
        model: with a head of one output.
        config: margin and centring.
        largest: responses of a ranking at most.
    """
    coefficients = {TERM: 1.0} | ({_CENTRING: config.centring} if config.centring else {})

    def weights(batch: Batch) -> Sums:
        rankings = jnp.sum(pairs_of(batch, largest).weights)
        return dict.fromkeys(coefficients, rankings) | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        rewards, output = response_rewards(model, trees.merge(params, frozen), batch, row_keys)
        pairs = pairs_of(batch, largest)
        margin = pairs.difference(rewards)
        wanted = config.margin * pairs.difference(at_ends(batch["scores"], batch))
        centre = pairs.better(rewards) + pairs.worse(rewards)
        terms = {
            TERM: pairs.total(jax.nn.softplus(wanted - margin)),
            _CENTRING: pairs.total(jnp.square(centre)),
        }
        measured = {
            "loss": jax.nn.softplus(-margin),
            "accuracy": jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32)),
            "reward": centre / 2,
            "margin": margin,
        }
        rankings = jnp.sum(pairs.weights)
        metrics: Metrics = {name: (pairs.total(v), rankings) for name, v in measured.items()}
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return (
            {name: terms[name] for name in coefficients} | router_terms,
            metrics | router_metrics,
        )

    return Objective(coefficients | router_coefficients(model), weights, sums)


def response_rewards(
    model: TransformerConfig, params: Params, batch: Batch, row_keys: RowKeys = None
) -> tuple[Float[Array, "batch responses"], Output]:
    """The reward of each response of a row, in order, and the forward pass that it was read of."""
    outputs, output = text_outputs(model, params, batch, row_keys)
    return at_ends(outputs[..., 0], batch), output
