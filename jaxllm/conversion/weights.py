"""Tables of weights: which of their tensors holds which of our parameters, and how.

A table names tensors once. `tensors` lays it out for one model, and both reading and writing go
through what it gives.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import param_shapes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of theirs, of each layer and expert that its name has a place for."""

    theirs: str
    """Its name, in which `{layer}` and `{expert}` stand for numbers."""
    ours: tuple[str, ...]
    """Paths of our parameters, below a layer where there is `{layer}`; the tensor has them side
    by side, along the axis that is the last of ours. One that a model lacks is passed over."""
    transposed: bool = False
    """Whether a matrix of theirs is [out, in]."""


class Part(NamedTuple):
    """A parameter of ours, or what one layer (and one expert) has of it."""

    path: str
    place: tuple[int, ...]
    """Along the leading axes of the stack's repeats and of the experts."""


class Tensor(NamedTuple):
    """A tensor of theirs in one model."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """What it has side by side."""
    sizes: tuple[int, ...]
    """How much of the axis each part takes."""
    transposed: bool


class Source(NamedTuple):
    """Where a part of ours is in their tensors."""

    tensor: Tensor
    begin: int
    """Along the axis that is the last of ours."""


def linear(theirs: str, *ours: str, transposed: bool = True) -> tuple[Weight, Weight]:
    """The kernel and, where there is one, the bias of a matrix product, or of several whose
    matrices their tensor has side by side."""
    kernels = tuple(f"{path}/kernel" for path in ours)
    biases = tuple(f"{path}/bias" for path in ours)
    return Weight(f"{theirs}.weight", kernels, transposed), Weight(f"{theirs}.bias", biases)


def norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
    """The scale and, where there is one, the bias of a norm."""
    scale, bias = (f"{ours}/scale",), (f"{ours}/bias",)
    return Weight(f"{theirs}.weight", scale), Weight(f"{theirs}.bias", bias)


def tensors(table: Sequence[Weight], model: TransformerConfig) -> tuple[Tensor, ...]:
    """All tensors of theirs that `model` has, in the order of its layers.

    Raises:
        LookupError: the table has no place for a parameter of the model.
    """
    shapes = {path: leaf.shape for path, leaf in trees.leaves_with_paths(param_shapes(model))}
    found = [_tensor(weight, shapes, "", 0, ()) for weight in table if "{" not in weight.theirs]
    for number, (begin, repeat) in enumerate(_layers(model)):
        for weight in table:
            for expert in _experts(weight, shapes, begin):
                index = (repeat, *expert)
                found.append(_tensor(weight, shapes, f"{begin}/", number, index))
    whole = tuple(tensor for tensor in found if tensor)
    missing = set(shapes) - {part.path for tensor in whole for part in tensor.parts}
    if missing:
        raise LookupError(f"the table has no place for {sorted(missing)}")
    return whole


def sources(laid_out: Sequence[Tensor]) -> dict[str, dict[tuple[int, ...], Source]]:
    """For each path of ours and each index along its leading axes, where it is in theirs."""
    found: dict[str, dict[tuple[int, ...], Source]] = {}
    for tensor in laid_out:
        begin = 0
        for part, size in zip(tensor.parts, tensor.sizes, strict=True):
            found.setdefault(part.path, {})[part.place] = Source(tensor, begin)
            begin += size
    return found


def _layers(model: TransformerConfig) -> Iterator[tuple[str, int]]:
    """Of each layer in order, where it is: `stack_I/layer_J`, and the repeat of the stack."""
    for number, stack in enumerate(model.stacks):
        for repeat in range(stack.repeats):
            for layer in range(len(stack.unit)):
                yield f"stack_{number}/layer_{layer}", repeat


def _experts(
    weight: Weight, shapes: Mapping[str, tuple[int, ...]], begin: str
) -> Iterator[tuple[int, ...]]:
    """The indices of the experts that have the tensor; one of no axis where there are none."""
    if "{expert}" in weight.theirs:
        shape = shapes.get(f"{begin}/{weight.ours[0]}")
        yield from ((expert,) for expert in range(shape[1] if shape else 0))
    elif "{layer}" in weight.theirs:
        yield ()


def _tensor(
    weight: Weight,
    shapes: Mapping[str, tuple[int, ...]],
    begin: str,
    layer: int,
    index: tuple[int, ...],
) -> Tensor | None:
    """The tensor of one layer and expert; None where the model lacks it."""
    parts = tuple(Part(begin + path, index) for path in weight.ours)
    if not all(part.path in shapes for part in parts):
        return None
    own = [shapes[part.path][len(index) :] for part in parts]
    sizes = tuple(shape[-1] for shape in own)
    shape = (*own[0][:-1], sum(sizes))
    shape = shape[::-1] if weight.transposed else shape
    name = weight.theirs.format(layer=layer, expert=index[-1] if index else 0)
    return Tensor(name, shape, parts, sizes, weight.transposed)
