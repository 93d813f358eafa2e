"""The Python face: run a stage, load a run's model, write or classify with it.

from jaxllm import api

model = api.load("runs/first")
print(model.generate(["def "], max_new_tokens=64, temperature=0.8)[0])
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.inference.classifier import Classifier, Prediction, classifier_of
from jaxllm.inference.requests import Sampling
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.main import run
from jaxllm.sharding.mesh import MeshConfig, make_mesh

__all__ = ["Model", "load", "run"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model on its devices; made by `load`."""

    path: Path
    trained: TrainedModel
    mesh: Mesh

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, **sampling: float | tuple[str, ...]
    ) -> list[str]:
        """Continues each prompt.

        Args:
            prompts: each is read as the beginning of a document.
            seed: of the draws; the same seed gives the same text.
            **sampling: fields of `jaxllm.inference.requests.Sampling`.

        Returns:
            The continuations, without the prompts.
        """
        with jax.set_mesh(self.mesh):
            options = Sampling(**sampling)  # type: ignore[arg-type]
            return self.trained.generate(prompts, options, seed)

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """What each text is, of a run of `classify`.

        Raises:
            jaxllm.errors.UserError: the model is of another stage.
        """
        with jax.set_mesh(self.mesh):
            return self.classifier(texts)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """What classifies."""
        return classifier_of(RunDirectory(self.path), self.trained.loaded)


def load(path: str | Path, mesh: MeshConfig | None = None) -> Model:
    """The model of the run directory at `path`, from its newest readable checkpoint.

    Args:
        path: the `--workdir` of a training run.
        mesh: how to lay it over the devices; by default, a copy on each.

    Raises:
        jaxllm.errors.UserError: there is no such run, or it has no checkpoint.
    """
    devices = make_mesh(mesh or MeshConfig())
    with jax.set_mesh(devices):
        return Model(Path(path), load_trained(path, devices), devices)
