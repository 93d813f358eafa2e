"""GRPO, and its kin: a policy alone learns from advantages that its rollouts give.

Shao et al. 2024, https://arxiv.org/abs/2402.03300. What tells the kin apart lies in the advantages
(`rollouts/advantages.py`), and in what `PolicyLossConfig` says.
"""

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.policy_gradient import PolicyLossConfig, policy_sums, policy_weights
from jaxllm.objectives.responses import learnt_log_probs
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights


def grpo(
    model: TransformerConfig, config: PolicyLossConfig, temperature: float, most: int
) -> Objective:
    """The loss and the metrics of `objectives.policy_gradient`.

    Args:
        model: the policy's.
        config: of the loss.
        temperature: divides the logits, as it did where responses were drawn.
        most: actions of a response at most.
    """

    def weights(batch: Batch) -> Sums:
        return policy_weights(config, batch) | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        del row_keys  # nothing is dropped: the rollout drops nothing either
        params = trees.merge(params, frozen)
        scores, output = learnt_log_probs(model, params, batch, temperature)
        terms, metrics = policy_sums(config, scores, batch, most)
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return terms | router_terms, metrics | router_metrics

    return Objective(config.coefficients | router_coefficients(model), weights, sums)
