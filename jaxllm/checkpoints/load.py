"""Loading what an earlier run made: its model, parameters and tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxllm import config as configuration
from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.sharding.rules import with_shardings
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """A trained model, ready to generate, to be evaluated or to be trained further."""

    model: TransformerConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    step: int


def load_model(
    path: str | Path, mesh: Mesh, model_config: ModelConfig | None = None
) -> LoadedModel:
    """The newest readable checkpoint of the run directory at `path`, laid out over `mesh`.

    Of a run that averages its parameters (`train.ema`), the checkpoint gives the average.

    Args:
        path: the run directory.
        mesh: the devices.
        model_config: of the run's shape, whatever else differs; None: as the run recorded it, but
            computed in the way that suits this machine.

    Raises:
        UserError: there is no such run, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    # Another machine may lack the run's attention backend, and only training needs `remat`.
    recorded = dataclasses.replace(model_config_of(run), attention="auto", remat="none")
    tokenizer = load_tokenizer(run.tokenizer)
    model = architecture(model_config or recorded, tokenizer.vocab_size)
    shapes = with_shardings(param_shapes(model), SHARDING_RULES, mesh)
    if not run.checkpoints.is_dir():
        raise UserError(f"{run.path}: the run has no checkpoint yet; let it train longer.")
    checkpointer = Checkpointer(run.checkpoints, keep=1, read_only=True)
    try:
        restored = checkpointer.restore_params(shapes)
    finally:
        checkpointer.close()
    if restored is None:
        raise UserError(f"{run.path}: the run has no checkpoint yet; let it train longer.")
    step, params = restored
    return LoadedModel(model, params, tokenizer, step)


def model_config_of(run: RunDirectory) -> ModelConfig:
    """The model's configuration as the run recorded it."""
    return configuration.from_dict(ModelConfig, run.group("model"), "model")
