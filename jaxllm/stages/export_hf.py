"""The `export_hf` stage: a trained model becomes a folder that Hugging Face Transformers loads."""

import dataclasses
from pathlib import Path

import jax

from jaxllm.checkpoints.load import load_model, model_config_of
from jaxllm.conversion.configuration import written_config
from jaxllm.conversion.writing import check_empty, write_published
from jaxllm.errors import UserError
from jaxllm.objectives.pretraining import objective_config_of
from jaxllm.sharding.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A folder of weights in the Hugging Face format, made of a run."""

    stage: str = "export_hf"
    """Always `export_hf`."""
    init: str = ""
    """Run directory, or folder of published weights, whose model is exported."""
    dtype: str = ""
    """Dtype of the weights: `float32` or `bfloat16`; empty: as the run keeps its parameters."""
    max_shard_bytes: int = 5_000_000_000
    """Weights of more than this become several files and an index."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"dtype: must be float32 or bfloat16, and was given {self.dtype!r}")
        if self.max_shard_bytes < 1:
            raise ValueError("max_shard_bytes: must be at least 1")


def run(config: ExportConfig, workdir: Path | None) -> None:
    """Writes weights, configuration and tokenizer into `workdir`, which must be new or empty."""
    if workdir is None:
        raise UserError("--workdir is missing: give the folder that the weights are to be put in.")
    if not config.init:
        raise UserError("config.init: give the run directory of a trained model.")
    if jax.process_count() > 1:
        raise UserError("config.mesh: weights are exported by one process; start one.")
    check_empty(workdir)
    model_config = model_config_of(config.init)
    _check_objective(config.init)
    written_config(model_config)  # what cannot be told is found before anything is loaded
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        loaded = load_model(config.init, mesh)
        told = dataclasses.replace(
            model_config, vocab_size=loaded.model.vocab_size, max_positions=loaded.context
        )
        write_published(
            workdir,
            told,
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            dtype=config.dtype or loaded.model.dtypes.params,
            max_shard_bytes=config.max_shard_bytes,
        )
    print(f'{workdir}: load it with AutoModelForCausalLM.from_pretrained("{workdir}")')


def _check_objective(init: str) -> None:
    """Checks that the model writes in the way that published ones are used.

    Raises:
        UserError: it has learnt another objective than the next token.
    """
    kind = objective_config_of(init).kind
    if kind != "next_token":
        raise UserError(
            f"config.objective.kind: is {kind!r} in {init}; whoever loads published weights takes "
            "them to predict the next token from what came before, as this model has not learnt, "
            "so it cannot be exported."
        )
