"""Several adapters of one base in service at once: each text is written with its own, or none.

Their low-rank pairs are held in one tree, along an axis of adapters behind that of a stack's
repeats; number 0 is no adapter. Before a batch is computed each row's own are taken out of it, and
`Linear` applies them row by row.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxllm import trees
from jaxllm.checkpoints.base import check_base, parameter_checksums
from jaxllm.checkpoints.load import (
    LoadedModel,
    fitted,
    load_adapter,
    lora_config_of,
    model_config_of,
)
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig, bare
from jaxllm.models.families import architecture
from jaxllm.models.lora import PAIRS, SCALE, A, B, adapted_path
from jaxllm.models.stacks import restacked
from jaxllm.objectives.objective import Params

_BY_ROW = r"stack_\d+/layer_\d+/(?!.*/experts/).*/kernel"
"""Matrices that `Linear` applies, and that every row can have a pair of its own for."""


def parse_adapters(text: str) -> dict[str, str]:
    """`NAME=RUN,NAME=RUN` as runs by name.

    Raises:
        ValueError: an entry is not of this form, or two have one name.
    """
    found: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, _, run = map(str.strip, entry.partition("="))
        if not (name and run):
            raise ValueError(f"adapters: {entry!r} is not NAME=RUN")
        if name in found:
            raise ValueError(f"adapters: two are called {name}")
        found[name] = run
    return found


def load_adapters(runs: Mapping[str, str], base: LoadedModel, mesh: Mesh) -> dict[str, Params]:
    """The low-rank pairs of several runs, by name.

    Args:
        runs: directories of runs that have trained pairs beside `base`.
        base: the model.
        mesh: where it lies.

    Raises:
        UserError: a run is no adapter, is one of another base, or has trained something that rows
            of a batch cannot have each for itself; the message says which and what to do.
    """
    found: dict[str, Params] = {}
    if not runs:
        return found
    plain: TransformerConfig | None = None
    for name, path in runs.items():
        run = RunDirectory(path)
        model = architecture(bare(model_config_of(path)), base.tokenizer.vocab_size)
        if not lora_config_of(run).rank:
            raise UserError(f"config.adapters: {name}: {path} is no adapter (its lora.rank is 0).")
        if plain is None or plain.stacks != model.stacks:
            plain, checksums = model, _checksums(base, model, mesh)
        check_base(run, "config.init", checksums)
        whole_model = architecture(model_config_of(path), base.tokenizer.vocab_size)
        adapter = load_adapter(run, whole_model, mesh)
        if adapter.config.base:
            raise UserError(
                f"config.adapters: {name}: was trained beside a base held as "
                f"{adapter.config.base}, which others here are not; use it alone, as "
                f"--config.init={path}."
            )
        for leaf, _ in trees.leaves_with_paths(adapter.params):
            matrix = adapted_path(leaf)
            whole = re.fullmatch(PAIRS, leaf) and not leaf.endswith("_magnitude")
            if not whole or not re.fullmatch(_BY_ROW, matrix) or _latent(base, matrix):
                raise UserError(
                    f"config.adapters: {name}: has trained {leaf}, which texts of a batch cannot "
                    f"have each for itself; use it alone, as --config.init={path}."
                )
        found[name] = restacked(adapter.params, model.stacks, base.model.stacks)
    return found


def _checksums(base: LoadedModel, plain: TransformerConfig, mesh: Mesh) -> dict[str, int]:
    """Those of the base's parameters in the layout that they are recorded in; of a model that
    cannot be laid out so, of what it is."""
    same = plain.layers == base.model.layers
    return parameter_checksums(
        fitted(base.params, base.model, plain, mesh) if same else base.params
    )


def _latent(base: LoadedModel, matrix: str) -> bool:
    """Whether a matrix is multiplied into others by latent attention, and is no product itself."""
    return any(hasattr(layer.attention, "latent_width") for layer in base.model.unrolled) and (
        "/attention/" in matrix
    )


def joined(adapters: Sequence[Params]) -> dict[str, Any]:
    """The pairs of all adapters, in order behind none, along an axis behind that of repeats.

    Lower ranks are filled up with zeros, and so is a pair that an adapter does not have.
    """
    flat = [dict(trees.leaves_with_paths(params)) for params in adapters]
    found: dict[str, Any] = {}
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        if not path.endswith((A, B, SCALE)):  # nothing is dropped when texts are written
            continue
        given = [leaves.get(path) for leaves in flat]
        shapes = [leaf.shape for leaf in given if leaf is not None]
        shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        filled = [jnp.zeros(shape), *(_filled(leaf, shape) for leaf in given)]
        trees.insert(found, path, jnp.stack(filled, axis=1))
    return found


def _filled(leaf: Array | None, shape: tuple[int, ...]) -> Array:
    if leaf is None:
        return jnp.zeros(shape)
    widths = [(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)]
    return jnp.pad(leaf.astype(jnp.float32), widths)


def with_adapters(
    params: Params, pairs: Params | None, numbers: Int[Array, " batch"] | None
) -> Params:
    """The parameters with the pair of each row's adapter beside their matrices.

    Args:
        params: of the base.
        pairs: from `joined`; None: there are no adapters.
        numbers: of each row's adapter; 0 is none.
    """
    if pairs is None or numbers is None:
        return params
    return trees.merge(params, jax.tree.map(lambda leaf: leaf[:, numbers], pairs))


def check_known(name: str, adapters: Sequence[str], field: str) -> None:
    """Checks that there is an adapter of this name; empty is none.

    Raises:
        UserError: there is not.
    """
    if name and name not in adapters:
        known = f"known are {', '.join(adapters)}" if adapters else "config.adapters names none"
        raise UserError(f"{field}: {name!r} is no adapter; {known}.")
