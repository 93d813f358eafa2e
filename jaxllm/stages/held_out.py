"""What a training stage measures on held-out documents, at a step and at the end."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from jax.sharding import Mesh

from jaxllm import trees
from jaxllm.data.batches import EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.packing import NO_VALUES, PartValues, packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.data.training_rows import Beside
from jaxllm.objectives.objective import Batch, Params
from jaxllm.sharding.mesh import batch_sharding
from jaxllm.stages.fields import TrainingFields
from jaxllm.training.state import TrainState

Measure = Callable[[Params, Params, Iterable[Batch]], dict[str, float]]
"""`measure(params, frozen, batches) -> scores`, of the trained parameters and the others."""
WriteSamples = Callable[[int, Params], None]
"""`write_samples(step, params)`, of all parameters."""


class HeldOut:
    """Evaluates a state on a store, and remembers what it measured last."""

    def __init__(
        self,
        config: TrainingFields,
        data: DataConfig,
        store: TokenStore,
        mesh: Mesh,
        measure: Measure,
        write_samples: WriteSamples,
        part_values: Mapping[str, Sequence[PartValues]] = NO_VALUES,
        beside: Beside = lambda store, rows: rows,
    ) -> None:
        """Args:
        config: of the stage.
        data: how documents are laid into rows.
        store: what is measured on.
        mesh: where batches go.
        measure: gives scores of parameters on batches.
        write_samples: shows what parameters make of some texts.
        part_values: what rows are to tell more of the parts of documents (`packed_rows`).
        beside: the rows, with more arrays in them.
        """
        self._config, self._measure, self._write_samples = config, measure, write_samples
        rows = packed_rows(store, data.packing, data.seq_len, data.document_mask, part_values)
        self._rows = beside(store, rows)
        self._sharding = batch_sharding(mesh)
        self._latest: dict[int, dict[str, float]] = {}

    def __call__(self, step: int, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores at a step, on `eval.max_batches` batches spread over the store or on all; writes
        samples."""
        scores = self._measured(state, frozen, self._config.eval.max_batches)
        self._latest = {step: scores}
        self._write_samples(step, trees.merge(state.evaluation_params, frozen))
        return scores

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
        return self._measure(state.evaluation_params, frozen, batches)
