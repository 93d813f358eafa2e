"""Adapters in PEFT's format, in and out: `adapter_config.json` and `adapter_model.safetensors`.

The names of their tensors follow from the table of the base's family. Beside its tensor NAME.weight
stand, below `base_model.model.`,

    NAME.lora_A.weight            [rank, in]       NAME.lora_embedding_A   [rank, vocab]
    NAME.lora_B.weight            [out, rank]      NAME.lora_embedding_B   [width, rank]
    NAME.lora_magnitude_vector    [out]            (DoRA)

A tensor of theirs that has several matrices of ours side by side (GPT-2's `c_attn`) has one pair
for them all: read, each of ours gets its A and its part of B; written, ranks add up, and B is by
blocks.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from jaxllm import trees
from jaxllm.conversion.tables import Table
from jaxllm.conversion.tensor_files import TensorFiles, open_tensors
from jaxllm.conversion.weights import Tensor, tensors
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.models.config import TransformerConfig
from jaxllm.models.lora import DROPOUT, MAGNITUDE, SCALE, A, B, LoraConfig, pair_shapes
from jaxllm.models.transformer import param_shapes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, ADAPTER_TORCH = "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDE = ".lora_magnitude_vector"
# What an adapter of theirs may do beside pairs, and ours cannot: each with what means "no".
_NEVER: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Others change the base.
    "init_lora_weights": (True, False, None, "gaussian"),
}

Matrix = Float[np.ndarray, "..."]


class _Theirs(NamedTuple):
    """The pair beside one tensor of theirs, in our order of axes."""

    a: Matrix
    """[in, rank]"""
    b: Matrix
    """[rank, out]"""
    scale: float
    magnitude: Matrix | None


class _Scale(NamedTuple):
    """How a written pair is scaled."""

    rank: int
    scale: float


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(
    folder: str | Path, model: TransformerConfig, table: Table
) -> tuple[LoraConfig, dict[str, Any]]:
    """The pairs of an adapter, as leaves beside the matrices of `model`, on the host.

    A layer that the adapter leaves out gets a pair of zeros, where others of its stack have one.

    Args:
        folder: with the adapter's files.
        model: the base.
        table: of the base's family.

    Raises:
        UserError: the files cannot be read, hold something else than low-rank pairs, or pairs that
            do not fit the base; the message names the field or tensor.
    """
    folder = Path(folder)
    theirs = _their_config(folder)
    found: dict[str, dict[tuple[int, ...], _Theirs]] = {}
    with open_tensors(folder, ADAPTER_WEIGHTS, ADAPTER_TORCH) as files:
        unread = set(files.shapes)
        for tensor in tensors(table.weights, model):
            if pair := _read_pair(files, tensor, theirs, unread):
                for path, place, own in _apart(tensor, pair):
                    found.setdefault(path, {})[place] = own
        if unread or not found:
            what = f"{sorted(unread)[0]} is beside no matrix of the base" if unread else "no pairs"
            raise UserError(f"{folder}: does not fit the base: {what}.")
    rank = max(pair.a.shape[-1] for places in found.values() for pair in places.values())
    config = LoraConfig(
        rank=rank,
        alpha=float(theirs["lora_alpha"]),
        pattern="|".join(map(re.escape, found)),
        dropout=float(theirs.get("lora_dropout") or 0.0),
        rslora=bool(theirs.get("use_rslora")),
        dora=bool(theirs.get("use_dora")),
    )
    shapes = dict(trees.leaves_with_paths(pair_shapes(param_shapes(model), config)))
    leaves: dict[str, Any] = {}
    for path, leaf in shapes.items():
        trees.insert(leaves, path, np.zeros(leaf.shape, np.float32))
    flat = dict(trees.leaves_with_paths(leaves))
    for path, leaf in flat.items():
        if path.endswith((SCALE, DROPOUT)):
            leaf[...] = config.scale if path.endswith(SCALE) else config.dropout
    for path, places in found.items():
        lengths = flat.get(path + MAGNITUDE)
        given = sum(pair.magnitude is not None for pair in places.values())
        if lengths is not None and given < math.prod(lengths.shape[:-1]):
            raise UserError(
                f"{folder}: use_dora is true, and only {given} of the "
                f"{math.prod(lengths.shape[:-1])} layers have a magnitude beside {path}."
            )
        for place, pair in places.items():
            own = pair.a.shape[-1]
            flat[path + A][place][:, :own] = pair.a
            flat[path + B][place][:own] = pair.b
            flat[path + SCALE][place] = pair.scale
            if lengths is not None:
                lengths[place] = pair.magnitude
    return config, leaves


def write_adapter(
    folder: str | Path,
    base: str,
    config: LoraConfig,
    pairs: trees.Tree,
    model: TransformerConfig,
    table: Table,
) -> None:
    """Writes pairs as an adapter that PEFT loads onto the exported base.

    Args:
        folder: new or empty.
        base: what the adapter calls its base.
        config: of the pairs.
        pairs: the leaves beside the matrices of `model`.
        model: the base.
        table: of the base's family.

    Raises:
        UserError: PEFT's format has no place for one of them.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in trees.leaves_with_paths(pairs)}
    _check_has_places(leaves, model)
    arrays: dict[str, Matrix] = {}
    written: dict[Tensor, _Scale] = {}
    for tensor in tensors(table.weights, model):
        if not any(part.path + A in leaves for part in tensor.parts):
            continue
        name, pair = _PREFIX + _module(tensor), _together(tensor, leaves)
        keys = _EMBEDDING if _is_embedding(tensor) else _LINEAR
        arrays[name + keys[0]] = np.ascontiguousarray(pair.a.T)
        arrays[name + keys[1]] = np.ascontiguousarray(pair.b.T)
        if pair.magnitude is not None:
            arrays[name + _MAGNITUDE] = pair.magnitude
        written[tensor] = _Scale(pair.a.shape[-1], pair.scale)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        # Last: without it nobody takes the folder for an adapter.
        write_json(folder / ADAPTER_CONFIG, _adapter_config(base, config, written))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None


def _check_has_places(leaves: Mapping[str, Matrix], model: TransformerConfig) -> None:
    """Raises: UserError: PEFT's format has no place for a pair."""
    if "embedding" + A in leaves and model.tied:
        raise UserError(
            "config.adapter: a pair beside the embedding of a tied model counts in its output too, "
            "which PEFT's does not; export the model with the pairs in it (config.adapter=False)."
        )
    if any("/experts/" in path for path in leaves):
        raise UserError(
            "config.adapter: PEFT's format has no place for the pairs of experts; export the model "
            "with the pairs in it (config.adapter=False)."
        )


def _adapter_config(
    base: str, config: LoraConfig, written: Mapping[Tensor, _Scale]
) -> dict[str, Any]:
    """`adapter_config.json` of the pairs of tensors."""
    ranks = {_module(tensor): each.rank for tensor, each in written.items()}
    alphas = {
        _module(tensor): each.scale * (each.rank**0.5 if config.rslora else each.rank)
        for tensor, each in written.items()
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": any(not t.transposed for t in written if not _is_embedding(t)),
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {
            name: alpha
            for name, alpha in alphas.items()
            if not math.isclose(alpha, config.alpha, rel_tol=1e-5)
        },
    }


def _module(tensor: Tensor) -> str:
    """The name of the module that a tensor is the weight of."""
    return tensor.name.removesuffix(".weight")


def _is_embedding(tensor: Tensor) -> bool:
    return tensor.parts[0].path == "embedding"


def _their_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("is no JSON object")
        if theirs.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {theirs.get('peft_type')!r}, and only LORA is known")
        for field, none in _NEVER.items():
            if theirs.get(field, none[0]) not in none:
                raise ValueError(f"{field} is {theirs[field]!r}, which is not known here")
        for field in ("r", "lora_alpha"):
            value = theirs.get(field)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"{field} is {value!r}, and must be a positive number")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}.") from None
    return theirs


def _read_pair(
    files: TensorFiles, tensor: Tensor, theirs: Mapping[str, Any], unread: set[str]
) -> _Theirs | None:
    """The pair beside a tensor, which is taken out of `unread`; None if there is none."""
    name = _module(tensor)
    keys = [
        _PREFIX + name + suffix for suffix in (_EMBEDDING if _is_embedding(tensor) else _LINEAR)
    ]
    if not unread.intersection(keys):
        return None
    for key in keys:
        if key not in unread:
            raise UserError(f"{files.folder}: {key} is missing.")
    a, b = (np.asarray(_whole(files, key), np.float32).T for key in keys)
    rows, columns = _matrix_shape(tensor)
    if (a.shape[0], b.shape[1]) != (rows, columns) or a.shape[1] != b.shape[0]:
        raise UserError(
            f"{files.folder}: {keys[0]} {files.shapes[keys[0]]} and {keys[1]} "
            f"{files.shapes[keys[1]]} do not fit {tensor.name} {tensor.shape} of the base."
        )
    unread.difference_update(keys)
    magnitude, key = None, _PREFIX + name + _MAGNITUDE
    if key in unread:
        magnitude = np.asarray(_whole(files, key), np.float32).reshape(-1)
        unread.discard(key)
    rank = a.shape[1]
    alpha = _of_pattern(theirs.get("alpha_pattern"), name, float(theirs["lora_alpha"]))
    scale = alpha / (rank**0.5 if theirs.get("use_rslora") else rank)
    return _Theirs(a, b, scale, magnitude)


def _whole(files: TensorFiles, key: str) -> Matrix:
    return files.read(key, (slice(None),) * len(files.shapes[key]))


def _of_pattern(patterns: Any, name: str, default: float) -> float:
    """The number of the first pattern that matches a module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return default


def _matrix_shape(tensor: Tensor) -> tuple[int, ...]:
    """Of all parts together, [in, out]."""
    return tensor.shape[::-1] if tensor.transposed else tensor.shape


def _apart(tensor: Tensor, pair: _Theirs) -> Iterator[tuple[str, tuple[int, ...], _Theirs]]:
    """What each matrix of ours has of a pair of theirs."""
    begin = 0
    for part, size in zip(tensor.parts, tensor.sizes, strict=True):
        here = slice(begin, begin + size)
        magnitude = None if pair.magnitude is None else pair.magnitude[here]
        yield part.path, part.place, _Theirs(pair.a, pair.b[:, here], pair.scale, magnitude)
        begin += size


def _together(tensor: Tensor, leaves: Mapping[str, Matrix]) -> _Theirs:
    """The one pair that is those of all parts: A side by side, B by blocks."""
    rows, columns = _matrix_shape(tensor)
    present = [part for part in tensor.parts if part.path + A in leaves]
    ranks = [leaves[part.path + A].shape[-1] for part in present]
    a, b = np.zeros((rows, sum(ranks)), np.float32), np.zeros((sum(ranks), columns), np.float32)
    scale = float(leaves[present[0].path + SCALE][present[0].place])
    magnitudes, row, column = [], 0, 0
    for part, size in zip(tensor.parts, tensor.sizes, strict=True):
        if part.path + A in leaves:
            own = leaves[part.path + A][part.place]
            width = own.shape[-1]
            a[:, row : row + width] = own
            factor = float(leaves[part.path + SCALE][part.place]) / scale
            whole = factor * leaves[part.path + B][part.place]
            b[row : row + width, column : column + size] = whole
            if part.path + MAGNITUDE in leaves:
                magnitudes.append(leaves[part.path + MAGNITUDE][part.place])
            row += width
        column += size
    if magnitudes and len(magnitudes) < len(tensor.parts):
        raise UserError(
            f"config.adapter: {tensor.name} holds several matrices, of which only some have DoRA's "
            "magnitudes; export the model with the pairs in it (config.adapter=False)."
        )
    return _Theirs(a, b, scale, np.concatenate(magnitudes) if magnitudes else None)
