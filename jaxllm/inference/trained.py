"""A trained model with the objective of its training, so that it is used as it has learnt to be."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh

from jaxllm.checkpoints.load import LoadedModel, load_model
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Completion, Request, Sampling
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, objective_config_of


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a run has made, or published weights; from `load_trained`. Its mesh must be set."""

    loaded: LoadedModel
    objective: ObjectiveConfig
    slots: int = 32
    """Texts written at once."""

    @functools.cached_property
    def engine(self) -> Engine:
        """What writes.

        Raises:
            UserError: the model sees both ways, and cannot write.
        """
        loaded = self.loaded
        return Engine(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            context=loaded.context,
            slots=self.slots,
            prompt_is_prefix=KINDS[self.objective.kind].prompt_is_prefix,
        )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """As `Engine.complete`."""
        return self.engine.complete(requests)

    def stream(self, request: Request) -> Iterator[str]:
        """As `Engine.stream`."""
        return self.engine.stream(request)

    def generate(self, prompts: Sequence[str], sampling: Sampling, seed: int = 0) -> list[str]:
        """As `Engine.generate`."""
        return self.engine.generate(prompts, sampling, seed)


def load_trained(path: str | Path, mesh: Mesh, slots: int = 32) -> TrainedModel:
    """The model at `path`, a run directory or a folder of published weights, as `load_model` gives
    it, and its objective.

    Raises:
        UserError: as `load_model`.
    """
    return TrainedModel(load_model(path, mesh), objective_config_of(path), slots)
