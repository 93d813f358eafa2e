"""What a rollout asks of the models that learn from it, and of the reference they are held to."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Batch, Params
from jaxllm.objectives.ppo import scores_and_values
from jaxllm.objectives.responses import learnt_log_probs
from jaxllm.sharding.mesh import in_micro_batches

PerToken = Float[Array, "rows seq"]
Measured = Mapping[str, PerToken]


@dataclasses.dataclass(frozen=True)
class Learner:
    """A policy, perhaps with a value function, and its reference."""

    policy: TransformerConfig
    value: TransformerConfig | None
    has_values: bool
    """Whether values are learnt: by `value`, or, if that is None, by a head of the policy."""
    reference: Callable[[Params], Params] | None
    """The reference's parameters, of all that are given; None: there is none."""
    needs_old: bool
    """Whether the policy's own log-probabilities are asked for."""
    temperature: float
    """Divides the logits of policy and reference alike, as where responses are drawn."""

    def measure(self, params: Params, rows: Batch, parts: int, length: int) -> dict[str, PerToken]:
        """`old_log_probs`, `reference_log_probs` and `old_values` of each place, as far as they are
        asked for; 0 where there is no action, or state.

        Args:
            params: of all models.
            rows: of a rollout.
            parts: into how many parts it is cut, one of which is computed at once.
            length: places that are used.
        """
        cut = {name: array[:, :length] for name, array in rows.items()}
        in_parts = {name: in_micro_batches(array, parts) for name, array in cut.items()}
        found = jax.lax.map(functools.partial(self._of_rows, params), in_parts)
        missing = rows["tokens"].shape[1] - length
        return {
            name: jnp.pad(_whole(values), ((0, 0), (0, missing))) for name, values in found.items()
        }

    def _of_rows(self, params: Params, rows: Batch) -> dict[str, PerToken]:
        actions, states = rows["loss_weights"] > 0, rows["value_weights"] > 0
        found: dict[str, PerToken] = {}
        if self.has_values:
            scores, values, _ = scores_and_values(
                self.policy, self.value, params, rows, self.temperature
            )
            found["old_values"] = jnp.where(states, values, 0.0)
        elif self.needs_old:
            scores, _ = learnt_log_probs(self.policy, params, rows, self.temperature)
        if self.needs_old:
            found["old_log_probs"] = jnp.where(actions, scores.log_prob, 0.0)
        if self.reference:
            other = self.reference(params)
            scores, _ = learnt_log_probs(self.policy, other, rows, self.temperature)
            found["reference_log_probs"] = jnp.where(actions, scores.log_prob, 0.0)
        return found


def _whole(parts: Float[Array, "parts part seq"]) -> PerToken:
    """The rows of `in_micro_batches` in their order again."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, parts.shape[-1])
