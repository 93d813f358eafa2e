"""Published weights into our parameters, slice by slice, straight to where they lie on the mesh."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jaxllm import trees
from jaxllm.conversion.configuration import table_of
from jaxllm.conversion.tables import Table
from jaxllm.conversion.tensor_files import TensorFiles, open_tensors
from jaxllm.conversion.weights import Source, Tensor, sources, tensors
from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.sharding.rules import with_shardings

Reader = Callable[[tuple[slice, ...]], Shaped[np.ndarray, "..."]]
"""Gives a part of one of our parameters."""

_TOLD = 3  # wrong tensors that a message names
_ROWS_AT_ONCE = 1024


def read_params(
    folder: str | Path, model: TransformerConfig, mesh: Mesh, table: Table | None = None
) -> dict[str, Any]:
    """The parameters of `model` from the published weights in `folder`, laid out over `mesh`.

    A process reads only what its devices hold, and holds on the host one layer of one parameter
    at a time.

    Args:
        folder: with the files of the weights.
        model: the architecture that they are of.
        mesh: the devices.
        table: of the weights; None: that of the family which `config.json` names.

    Raises:
        UserError: the weights cannot be read, or are not those of `model`: a tensor is missing,
            too many, of another shape, or quantised; the message names it and our parameter.
    """
    folder = Path(folder)
    table = table or table_of(folder)
    laid_out = tensors(table.weights, model)
    with open_tensors(folder) as files:
        in_file = _file_names(files, table)
        _check_tensors(files, in_file, laid_out, table)
        if model.tied:
            _check_tied(files, in_file, table)
        of_path = sources(laid_out)

        def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
            def read(where: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
                return _read(files, in_file, of_path[path], shape, where)

            stacked = len(next(iter(of_path[path]))) > 0
            return (_by_layer if stacked else _at_once)(shape, read)

        shapes = with_shardings(param_shapes(model), SHARDING_RULES, mesh)
        return trees.map_with_paths(leaf, shapes)


def published_dtype(folder: str | Path) -> str:
    """The dtype that parameters can be kept in without a loss: `bfloat16` where all weights in
    `folder` are of it, else `float32`.

    Raises:
        UserError: the weights cannot be read.
    """
    folder = Path(folder)
    table = table_of(folder)
    with open_tensors(folder) as files:
        in_file = _file_names(files, table)
        dtypes = {files.dtype(in_file[name]) for name in in_file if not _is_ignored(name, table)}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


def _at_once(shape: jax.ShapeDtypeStruct, read: Reader) -> jax.Array:
    """An array of what `read` gives of each shard."""

    def shard(where: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
        assert where is not None  # which it is for devices of other processes
        return read(where)

    array = jax.make_array_from_callback(shape.shape, shape.sharding, shard)
    # One after another, so that the memory of the host that was read into is free again.
    return jax.block_until_ready(array)


def _by_layer(shape: jax.ShapeDtypeStruct, read: Reader) -> jax.Array:
    """The same, a layer of the stack after the other: all layers at once would be a large part of
    the model, and the host would have to hold it."""
    whole: NamedSharding = shape.sharding
    of_layer = jax.ShapeDtypeStruct(
        shape.shape[1:],
        shape.dtype,
        sharding=NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:])),
    )
    stack = jnp.zeros(shape.shape, shape.dtype, device=whole)
    for number in range(shape.shape[0]):
        layer = _at_once(of_layer, functools.partial(_layer, read, number))
        stack = _put_in(whole)(stack, layer, number)
    return jax.block_until_ready(stack)


def _layer(read: Reader, number: int, where: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
    return read((slice(number, number + 1), *where))[0]


@functools.cache
def _put_in(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """What puts a layer in its place in a stack, which it takes for its own."""
    return jax.jit(
        lambda stack, layer, number: jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _read(
    files: TensorFiles,
    in_file: Mapping[str, str],
    found: Mapping[tuple[int, ...], Source],
    shape: jax.ShapeDtypeStruct,
    where: tuple[slice, ...],
) -> Shaped[np.ndarray, "..."]:
    """A part of one of our parameters, from the tensors that have it."""
    bounds = [part.indices(size)[:2] for part, size in zip(where, shape.shape, strict=True)]
    result = np.empty([end - begin for begin, end in bounds], shape.dtype)
    leading = len(next(iter(found)))
    first = np.array([begin for begin, _ in bounds[:leading]], int)
    for index in itertools.product(*(range(*ends) for ends in bounds[:leading])):
        tensor, shift = found[index]
        theirs = [slice(*ends) for ends in bounds[leading:]]
        theirs[-1] = slice(theirs[-1].start + shift, theirs[-1].stop + shift)
        name = in_file[tensor.name]
        part = files.read(name, tuple(theirs[::-1] if tensor.transposed else theirs))
        result[tuple(index - first)] = part.T if tensor.transposed else part
    return result


def _file_names(files: TensorFiles, table: Table) -> dict[str, str]:
    """The names that tensors have in the files, by their names in the table.

    Raises:
        UserError: two of them are of one name there.
    """
    found: dict[str, str] = {}
    for name in files.shapes:
        usual = name
        for pattern, begin in table.renamed:
            usual, changed = re.subn(f"^(?:{pattern})", begin, usual, count=1)
            if changed:
                break
        if usual in found:
            raise UserError(
                f"{files.folder}: {found[usual]} and {name} are the same tensor twice; take one "
                "of them out."
            )
        found[usual] = name
    return found


def _check_tensors(
    files: TensorFiles, in_file: Mapping[str, str], laid_out: tuple[Tensor, ...], table: Table
) -> None:
    """Checks that the files hold the tensors of the model, and nothing more.

    Raises:
        UserError: they do not; the message names the first wrong ones, and ours of them.
    """
    wrong = []
    for tensor in laid_out:
        ours = " and ".join(part.path for part in tensor.parts)
        our_shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        whose = f"of our {ours} {list(our_shape)}"
        if tensor.name not in in_file:
            wrong.append(f"the tensor {tensor.name} {list(tensor.shape)} {whose} is missing")
        elif files.shapes[in_file[tensor.name]] != tensor.shape:
            shape = list(files.shapes[in_file[tensor.name]])
            wrong.append(
                f"the tensor {tensor.name} {whose} is {shape}, and should be {list(tensor.shape)}"
            )
    for name in sorted(in_file.keys() - {tensor.name for tensor in laid_out}):
        if not _is_ignored(name, table) and name != _name_of(table, "output"):
            shape = list(files.shapes[in_file[name]])
            wrong.append(f"the tensor {in_file[name]} {shape} has no place in the model")
    if wrong:
        more = f"; and {len(wrong) - _TOLD:,} more" if len(wrong) > _TOLD else ""
        raise UserError(
            f"{files.folder}: {'; '.join(wrong[:_TOLD])}{more}. The weights are not those "
            "that config.json describes."
        )


def _is_ignored(name: str, table: Table) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.ignored)


def _check_tied(files: TensorFiles, in_file: Mapping[str, str], table: Table) -> None:
    """Checks that an output matrix which files have beside the embedding is the same."""
    head, embedding = (in_file.get(_name_of(table, path)) for path in ("output", "embedding"))
    if head is None or embedding is None:
        return
    same = files.shapes[head] == files.shapes[embedding]
    total = files.shapes[head][0]
    for begin in range(0, total if same else 0, _ROWS_AT_ONCE):
        rows = (slice(begin, min(begin + _ROWS_AT_ONCE, total)), slice(None))
        same = same and np.array_equal(files.read(head, rows), files.read(embedding, rows))
    if not same:
        raise UserError(
            f"{files.folder}: {head} is not {embedding}, and config.json says that they are one "
            "(tie_word_embeddings)."
        )


def _name_of(table: Table, path: str) -> str:
    """Their name of one of our parameters outside of the layers."""
    return next(weight.theirs for weight in table.weights if weight.ours == (path,))
