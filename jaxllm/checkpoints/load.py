"""Loading a model, its parameters and tokenizer: what an earlier run made, or published weights.

Wherever a run directory is given, a folder of published weights in the Hugging Face format can be.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxllm import config as configuration
from jaxllm import trees
from jaxllm.checkpoints.base import base_path, check_base, parameter_checksums
from jaxllm.checkpoints.checkpointer import Checkpointer
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import check_is_model, is_published, read_config
from jaxllm.conversion.reading import published_dtype, read_params
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig, TransformerConfig, bare
from jaxllm.models.families import architecture
from jaxllm.models.lora import LoraConfig, kept_pattern, merged, pair_shapes
from jaxllm.models.quantised import rounded
from jaxllm.models.stacks import restacked
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.sharding.rules import shardings, with_shardings
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """A trained model, ready to generate, to be evaluated or to be trained further."""

    model: TransformerConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    step: int
    """Updates that the run has made; 0 for published weights."""
    context: int
    """Tokens that the model is made for or, where that has no limit, that it was trained on at
    once; 0: neither is known."""


class LoadedAdapter(NamedTuple):
    """What a run has trained beside a base."""

    config: LoraConfig
    params: dict[str, Any]
    """The low-rank pairs, and whatever else was trained."""
    step: int


def load_model(
    path: str | Path, mesh: Mesh, model_config: ModelConfig | None = None
) -> LoadedModel:
    """The model at `path`, laid out over `mesh`; of a run, its newest readable checkpoint.

    Published weights that are all bfloat16 are kept so on an accelerator, where products are of
    bfloat16 anyhow; all others, and with a `model_config`, as its `param_dtype` says.

    Of a run that averages its parameters (`train.ema`), the checkpoint gives the average. One that
    has trained low-rank pairs is loaded with its base, into whose matrices they are added.

    Args:
        path: a run directory, or a folder of published weights.
        mesh: the devices.
        model_config: of the model's shape, whatever else differs, but for `top_layers` and `head`:
            stacks are cut as it says, a head that it does not have is left out, and one that is not
            at `path` is not among the parameters. None: as it was recorded or published, but
            computed in the way that suits this machine.

    Raises:
        UserError: there is no such model, the run has no checkpoint yet, the weights are not those
            that their configuration describes, or the base of an adapter is not what it was.
    """
    # Another machine may lack the run's attention backend, and only training needs `remat`.
    recorded = dataclasses.replace(model_config_of(path), attention="auto", remat="none")
    if model_config is None and is_published(path) and jax.default_backend() != "cpu":
        recorded = dataclasses.replace(recorded, param_dtype=published_dtype(path))
    tokenizer = load_tokenizer(tokenizer_path(path))
    wanted = model_config or recorded
    model = architecture(wanted, tokenizer.vocab_size)
    kept = dataclasses.replace(wanted, head=recorded.head, top_layers=recorded.top_layers)
    as_kept = architecture(kept, tokenizer.vocab_size)
    if is_published(path):
        step, params, trained_on = 0, read_params(path, as_kept, mesh), 0
    else:
        run = RunDirectory(path)
        trained_on = run.config().get("data", {}).get("seq_len", 0)
        if lora_config_of(run).rank:
            step, params = _adapted_params(run, as_kept, mesh, kept)
        else:
            shapes = with_shardings(param_shapes(as_kept), SHARDING_RULES, mesh)
            step, params = _newest_params(run, shapes)
    params = fitted(params, as_kept, model, mesh)
    return LoadedModel(model, params, tokenizer, step, model.max_positions or trained_on)


def fitted(
    params: dict[str, Any], kept: TransformerConfig, wanted: TransformerConfig, mesh: Mesh
) -> dict[str, Any]:
    """The parameters of a model as another wants them, whose stacks are cut elsewhere or which has
    another head, or none."""
    if kept.head.outputs != wanted.head.outputs:
        params = {name: leaf for name, leaf in params.items() if name != "head"}
    if kept.stacks == wanted.stacks:
        return params
    layout = shardings(
        jax.eval_shape(lambda p: restacked(p, kept.stacks, wanted.stacks), params),
        SHARDING_RULES,
        mesh,
    )
    return jax.jit(
        lambda params: restacked(params, kept.stacks, wanted.stacks), out_shardings=layout
    )(params)


def lora_config_of(run: RunDirectory) -> LoraConfig:
    """The low-rank pairs that a run has trained; of rank 0 where it has none."""
    return configuration.from_dict(LoraConfig, run.config().get("lora", {}), "lora")


def load_adapter(run: RunDirectory, model: TransformerConfig, mesh: Mesh) -> LoadedAdapter:
    """What a run has trained beside its base, which is not loaded.

    Raises:
        UserError: the run is no adapter, or has no checkpoint yet.
    """
    config = lora_config_of(run)
    if not config.rank:
        raise UserError(f"{run.path}: is no adapter (its config.lora.rank is 0).")
    shapes = param_shapes(model)
    trainable = run.config().get("train", {}).get("trainable", ".*")
    kept, _ = trees.divide(
        trees.merge(shapes, pair_shapes(shapes, config)), kept_pattern(trainable, config)
    )
    step, params = _newest_params(run, with_shardings(kept, SHARDING_RULES, mesh))
    return LoadedAdapter(config, params, step)


def _adapted_params(
    run: RunDirectory, model: TransformerConfig, mesh: Mesh, model_config: ModelConfig
) -> tuple[int, dict[str, Any]]:
    """The step of an adapter's run, and its base with the pairs added into its matrices."""
    path = base_path(run)
    base = load_model(path, mesh, bare(model_config)).params
    check_base(run, path, parameter_checksums(base))
    adapter = load_adapter(run, model, mesh)
    how = adapter.config.base

    def whole(base: trees.Tree, trained: trees.Tree) -> dict[str, Any]:
        # Rounded as the base was when the pairs were trained beside it.
        return merged(trees.replaced(rounded(base, how) if how else base, trained))

    with jax.set_mesh(mesh):
        # Donated, so that base and result need not both be there.
        return adapter.step, jax.jit(whole, donate_argnums=0)(base, adapter.params)


def model_config_of(path: str | Path) -> ModelConfig:
    """The configuration of the model at `path`, as the run recorded it or as it was published.

    Raises:
        UserError: there is no such model, or a published one that none of ours can be.
    """
    check_is_model(path)
    if is_published(path):
        return read_config(path)
    return configuration.from_dict(ModelConfig, RunDirectory(path).group("model"), "model")


def tokenizer_path(path: str | Path) -> Path:
    """Where the tokenizer of the model at `path` is."""
    return Path(path) if is_published(path) else RunDirectory(path).tokenizer


def _place(run: RunDirectory) -> tuple[str, bool]:
    """The branch in which the model stands among the parameters of a run, if any, and whether
    the run has trained others beside it."""
    config = run.config()
    if config.get("stage") == "ppo" and not config["value"]["shared"]:
        return "policy", True
    distill = config.get("distill", {})
    return "", any(distill.get(name) for name in ("hidden_coef", "attention_coef"))


def _newest_params(run: RunDirectory, shapes: Any) -> tuple[int, dict[str, Any]]:
    """The step and the parameters of the newest readable checkpoint; of a model that has been
    trained with others beside it, its own alone."""
    restored = None
    branch, has_others = _place(run)
    if run.checkpoints.is_dir():
        checkpointer = Checkpointer(run.checkpoints, keep=1, read_only=True)
        try:
            restored = checkpointer.restore_params(shapes, branch, has_others)
        finally:
            checkpointer.close()
    if restored is None:
        raise UserError(f"{run.path}: the run has no checkpoint yet; let it train longer.")
    return restored
