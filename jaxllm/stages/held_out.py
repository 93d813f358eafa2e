"""The loss on held-out documents, as a training stage asks for it at a step and at the end."""

from collections.abc import Callable

from jax.sharding import Mesh

from jaxllm.data.batches import EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.evaluation.loss import LossEvaluator
from jaxllm.objectives.objective import Objective, Params
from jaxllm.sharding.mesh import batch_sharding
from jaxllm.stages.fields import TrainingFields
from jaxllm.training.state import TrainState

Scores = Callable[[float], dict[str, float]]
"""What is told of a mean loss."""


class HeldOut:
    """Measures a state on a store, and remembers what it measured last."""

    def __init__(
        self,
        config: TrainingFields,
        data: DataConfig,
        store: TokenStore,
        mesh: Mesh,
        objective: Objective,
        scores: Scores,
    ) -> None:
        """Args:
        config: of the stage.
        data: how documents are laid into rows.
        store: what is measured on.
        mesh: where batches go.
        objective: has a metric `loss`.
        scores: the loss, in nats per predicted token, as scores.
        """
        self._config, self._scores = config, scores
        self._rows = packed_rows(store, data.packing, data.seq_len, data.document_mask)
        self._sharding = batch_sharding(mesh)
        self._evaluate = LossEvaluator(objective)
        self._latest: dict[int, dict[str, float]] = {}
        self.predicted = 0.0
        """Tokens whose loss the latest measurement averaged."""

    def scores(self, step: int, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores at a step: on `eval.max_batches` batches spread over the store, or on all."""
        self._latest = {step: self._measured(state, frozen, self._config.eval.max_batches)}
        return self._latest[step]

    def final_scores(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores on all of the store."""
        latest = self._latest.get(int(state.step))  # the loop has evaluated its last step
        if latest is None or self._config.eval.max_batches:
            return self._measured(state, frozen)
        return latest

    def _measured(
        self, state: TrainState, frozen: Params, max_batches: int = 0
    ) -> dict[str, float]:
        config = self._config
        rows = config.batch_size // config.micro_batches  # as many as training holds at once
        batches = EvalBatches(self._rows, rows, self._sharding, max_batches)
        loss, self.predicted = self._evaluate(state.evaluation_params, frozen, batches)["loss"]
        return self._scores(loss)
