"""A trained model with the objective of its training, so that it is used as it has learnt to be."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from jaxllm.checkpoints.load import LoadedModel, load_model
from jaxllm.inference.adapters import load_adapters
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Completion, Request, Sampling
from jaxllm.objectives.objective import Params
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, objective_config_of


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a run has made, or published weights; from `load_trained`. Its mesh must be set."""

    loaded: LoadedModel
    objective: ObjectiveConfig
    slots: int = 32
    """Texts written at once."""
    adapters: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    """Low-rank pairs beside the model, by name, for requests that ask for them."""

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
            adapters=self.adapters,
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


def load_trained(
    path: str | Path, mesh: Mesh, slots: int = 32, adapters: Mapping[str, str] | None = None
) -> TrainedModel:
    """The model at `path`, a run directory or a folder of published weights, as `load_model` gives
    it, and its objective; with the adapters of other runs beside it, by name.

    Raises:
        UserError: as `load_model` and `load_adapters`.
    """
    loaded = load_model(path, mesh)
    pairs = load_adapters(adapters or {}, loaded, mesh)
    return TrainedModel(loaded, objective_config_of(path), slots, pairs)
