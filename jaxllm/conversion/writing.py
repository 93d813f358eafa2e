"""Our parameters as a folder of published weights, which Hugging Face Transformers loads."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxllm import trees
from jaxllm.conversion.configuration import CONFIG, written_config
from jaxllm.conversion.tables import TABLES
from jaxllm.conversion.tensor_files import SAFETENSORS
from jaxllm.conversion.weights import Tensor, tensors
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def write_published(
    folder: str | Path,
    config: ModelConfig,
    model: TransformerConfig,
    params: trees.Tree,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes weights, configuration and tokenizer into `folder`, which must be empty or new.

    `config.json` comes last: without it nobody takes the folder for a model.

    Args:
        folder: where to.
        config: of the model, with its positions told.
        model: the architecture of `config`.
        params: its parameters; one tensor of theirs is brought to the host at a time.
        tokenizer: its tokenizer.
        dtype: of the weights, `float32` or `bfloat16`.
        max_shard_bytes: above this size the weights become several files and an index.

    Raises:
        UserError: the folder is not empty or cannot be written (a full disk), or the published
            family cannot be such a model.
    """
    folder = Path(folder)
    fields = written_config(config)
    check_empty(folder)
    laid_out = tensors(TABLES[config.family].weights, model)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leaves = dict(trees.leaves_with_paths(params))
        _write_weights(folder, laid_out, leaves, dtype, max_shard_bytes)
        tokenizer.save(folder)
        write_json(folder / "generation_config.json", ids)
        write_json(folder / CONFIG, fields | ids | {"dtype": dtype})
    except OSError as error:  # of a full disk, it names no file
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); what is there is not whole: remove "
            "it, and export again."
        ) from None


def check_empty(folder: Path) -> None:
    """Checks that nothing would be overwritten in `folder`.

    Raises:
        UserError: it is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there and not empty; give a folder that is new or empty.")


def _write_weights(
    folder: Path,
    laid_out: Sequence[Tensor],
    leaves: dict[str, Any],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    shards = list(_shards(laid_out, dtype, max_shard_bytes))
    stem = SAFETENSORS.removesuffix(".safetensors")
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        name = SAFETENSORS if len(shards) == 1 else name
        _write_file(folder / name, shard, leaves, dtype)
        file_of |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        size = sum(_size(tensor, dtype) for tensor in laid_out)
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_json(folder / f"{SAFETENSORS}.index.json", index)


def _shards(laid_out: Sequence[Tensor], dtype: str, max_shard_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in turn, as many together as fit; one that is larger is alone."""
    shard: list[Tensor] = []
    size = 0
    for tensor in laid_out:
        more = _size(tensor, dtype)
        if shard and size + more > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += more
    yield shard


def _write_file(path: Path, shard: Sequence[Tensor], leaves: dict[str, Any], dtype: str) -> None:
    """Writes tensors in the safetensors format (https://github.com/huggingface/safetensors):
    the length of a header, the header with each tensor's place as JSON, and the tensors.

    The library's own writer takes all tensors of a file at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + _size(tensor, dtype)
        place = {"dtype": _DTYPE_NAMES[dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        header[tensor.name] = place
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors are aligned
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for tensor in shard:
                file.write(_value(tensor, leaves, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _value(tensor: Tensor, leaves: dict[str, Any], dtype: str) -> Shaped[np.ndarray, "..."]:
    """The tensor on the host, in their order of axes."""
    parts = [np.asarray(jax.device_get(leaves[part.path][part.place])) for part in tensor.parts]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    joined = joined.astype(jnp.dtype(dtype), copy=False)
    return joined.T if tensor.transposed else joined


def _size(tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * jnp.dtype(dtype).itemsize
