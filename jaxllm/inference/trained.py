"""A trained model with the objective of its training, so that it is used as it has learnt to be."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jaxllm.checkpoints.load import LoadedModel, load_model
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.inference.generate import Sampling, generate_text
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, objective_config_of


class TrainedModel(NamedTuple):
    """What a run has made; from `load_trained`."""

    loaded: LoadedModel
    objective: ObjectiveConfig

    def generate(self, prompts: Sequence[str], sampling: Sampling, seed: int = 0) -> list[str]:
        """Continues each prompt, as `generate_text` does; the mesh must be set.

        Raises:
            UserError: the model cannot write, or has too few positions.
        """
        model, params, tokenizer, _ = self.loaded
        prefix = KINDS[self.objective.kind].prompt_is_prefix
        return generate_text(
            model, params, tokenizer, prompts, sampling, seed, prompt_is_prefix=prefix
        )


def load_trained(path: str | Path, mesh: Mesh) -> TrainedModel:
    """The model of the run directory at `path`, as `load_model` gives it, and its objective.

    Raises:
        UserError: there is no such run, or it has no checkpoint yet.
    """
    return TrainedModel(load_model(path, mesh), objective_config_of(RunDirectory(path)))
