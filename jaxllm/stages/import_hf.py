"""The `import_hf` stage: published weights become a run directory."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxllm import trees
from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import check_is_model, is_published, read_config
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.continued import continued_model


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """A run directory made of published weights in the Hugging Face format."""

    stage: str = "import_hf"
    """Always `import_hf`."""
    init: str = ""
    """Folder of published weights: `config.json`, `*.safetensors`, and the tokenizer's files."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()


def run(config: ImportConfig, workdir: Path | None) -> None:
    """Writes configuration, tokenizer and parameters as those of a run after no steps."""
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the run is to be kept in.")
    if not config.init:
        raise UserError("config.init: give a folder of published weights.")
    check_is_model(config.init)
    if not is_published(config.init):
        raise UserError(
            f"config.init: {config.init!r} is no folder of published weights, which has a "
            "config.json with a model_type."
        )
    model = continued_model(config.model, read_config(config.init))
    config = dataclasses.replace(config, model=model)
    directory = RunDirectory(workdir)
    directory.open(dataclasses.asdict(config), dataclasses.asdict(ImportConfig()))
    checkpointer = Checkpointer(directory.checkpoints, keep=1, warn=_fail)
    with contextlib.closing(checkpointer):
        if checkpointer.steps():
            print(f"{workdir}: the weights are imported already.")
            return
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            loaded = load_model(config.init, mesh, model)
            loaded.tokenizer.save(directory.tokenizer)
            directory.begin(dataclasses.asdict(config))
            # There is no progress, and Orbax saves no empty tree.
            checkpointer.save(0, loaded.params, {"step": np.zeros((), np.int32)})
    print(f"{workdir}: {model.family}, {trees.size(loaded.params):,} parameters")


def _fail(reason: str) -> None:
    raise UserError(reason)
