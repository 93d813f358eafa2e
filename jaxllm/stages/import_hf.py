"""The `import_hf` stage: published weights, or a published adapter, become a run directory."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import trees
from jaxllm.checkpoints.base import parameter_checksums, record_base
from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.checkpoints.load import load_model, model_config_of, tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import check_is_model, is_published, written_config
from jaxllm.conversion.peft import is_adapter, read_adapter
from jaxllm.conversion.tables import TABLES
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.lora import LoraConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.continued import continued_model
from jaxllm.tokenizers.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """A run directory made of published weights in the Hugging Face format, or of an adapter in
    PEFT's."""

    stage: str = "import_hf"
    """Always `import_hf`."""
    init: str = ""
    """Folder of published weights: `config.json`, `*.safetensors`, and the tokenizer's files; or of
    an adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    base: str = ""
    """Of an adapter: run directory or Hugging Face folder of the model that it belongs to."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    """Of an adapter, told by its files."""
    mesh: MeshConfig = MeshConfig()


def run(config: ImportConfig, workdir: Path | None) -> None:
    """Writes configuration, tokenizer and parameters as those of a run after no steps."""
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the run is to be kept in.")
    if not config.init:
        raise UserError("config.init: give a folder of published weights, or of an adapter.")
    if config.lora != LoraConfig():
        raise UserError("config.lora: is told by the adapter's files; leave it out.")
    adapter = is_adapter(config.init)
    if adapter and not config.base:
        raise UserError(
            "config.base: give the run directory or Hugging Face folder of the model that the "
            f"adapter {config.init} belongs to."
        )
    if config.base and not adapter:
        raise UserError(f"config.base: {config.init} is no adapter; leave it out.")
    _import(config, RunDirectory(workdir), adapter)


def _import(config: ImportConfig, directory: RunDirectory, adapter: bool) -> None:
    init = config.base if adapter else config.init
    check_is_model(init)
    if not adapter and not is_published(init):
        raise UserError(
            f"config.init: {init!r} is no folder of published weights, which has a config.json "
            "with a model_type."
        )
    model = continued_model(config.model, model_config_of(init))
    config = dataclasses.replace(config, model=model)
    mesh = make_mesh(config.mesh)
    pairs: dict[str, Any] = {}
    if adapter:
        written_config(model)  # that the base has a table is found before it is asked for
        size = load_tokenizer(tokenizer_path(init)).vocab_size
        lora, pairs = read_adapter(config.init, architecture(model, size), TABLES[model.family])
        config = dataclasses.replace(config, lora=lora)
    directory.open(dataclasses.asdict(config), dataclasses.asdict(ImportConfig()))
    checkpointer = Checkpointer(directory.checkpoints, keep=1, warn=_fail)
    with contextlib.closing(checkpointer):
        if checkpointer.steps():
            print(f"{directory.path}: the weights are imported already.")
            return
        with jax.set_mesh(mesh):
            loaded = load_model(init, mesh, model)
            loaded.tokenizer.save(directory.tokenizer)
            if adapter:
                record_base(directory, init, parameter_checksums(loaded.params))
            directory.begin(dataclasses.asdict(config))
            # There is no progress, and Orbax saves no empty tree.
            params = pairs or loaded.params
            checkpointer.save(0, params, {"step": np.zeros((), np.int32)})
    what = f"an adapter of rank {config.lora.rank}" if adapter else model.family
    print(f"{directory.path}: {what}, {trees.size(params):,} parameters")


def _fail(reason: str) -> None:
    raise UserError(reason)
