"""The `export_hf` stage: a trained model becomes a folder that Hugging Face Transformers loads."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxllm import trees
from jaxllm.checkpoints.base import base_path
from jaxllm.checkpoints.load import load_adapter, load_model, model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import is_published, written_config
from jaxllm.conversion.peft import write_adapter
from jaxllm.conversion.tables import TABLES
from jaxllm.conversion.writing import check_empty, write_published
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig, bare
from jaxllm.models.families import architecture
from jaxllm.models.lora import PAIRS
from jaxllm.objectives.pretraining import objective_config_of
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.tokenizer import load_tokenizer


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
    adapter: bool = False
    """Of a run that has trained low-rank pairs: write them alone, in PEFT's format, rather than the
    model with the pairs in its matrices."""
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
    recorded = model_config_of(config.init)
    model_config = bare(recorded)
    _check_objective(config.init)
    written_config(model_config)  # what cannot be told is found before anything is loaded
    mesh = make_mesh(config.mesh)
    if config.adapter:
        _export_adapter(config.init, model_config, mesh, workdir)
        return
    with jax.set_mesh(mesh):
        # A head has no place there, and nobody knows how layers lie in stacks here.
        loaded = load_model(config.init, mesh, None if model_config == recorded else model_config)
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


def _export_adapter(init: str, model_config: ModelConfig, mesh: Mesh, workdir: Path) -> None:
    """Writes the pairs of a run alone.

    Raises:
        UserError: the run has none, or has trained something else too.
    """
    if is_published(init):
        raise UserError(f"config.adapter: {init} is a model, and no adapter; leave it out.")
    run = RunDirectory(init)
    model = architecture(model_config, load_tokenizer(run.tokenizer).vocab_size)
    adapter = load_adapter(run, model, mesh)
    pairs, others = trees.divide(adapter.params, PAIRS)
    if others:
        path = next(path for path, _ in trees.leaves_with_paths(others))
        raise UserError(
            f"config.adapter: the run has trained {path} too, which is no low-rank pair; export "
            "the model as it is (config.adapter=False)."
        )
    table = TABLES[model_config.family]
    write_adapter(workdir, str(base_path(run)), adapter.config, pairs, model, table)
    print(f'{workdir}: load it with PeftModel.from_pretrained(base, "{workdir}")')


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
