"""Low-rank adaptation: pairs of thin matrices beside frozen ones, as leaves of the parameter tree.

A matrix W [in, out] at the path P is computed as W + s·A·B once there are leaves beside it
(Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    P_lora_a          [in, rank]      random at the start
    P_lora_b          [rank, out]     zero at the start, so that nothing is changed
    P_lora_scale      []              s = alpha / rank, or alpha / √rank (rsLoRA: Kalajdzievski
                                      2023, https://arxiv.org/abs/2312.03732); never trained
    P_lora_magnitude  [out]           of DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353):
                                      the matrix is m · (W + s·A·B) / ‖W + s·A·B‖ by columns
    P_lora_dropout    []              share of the pair's input dropped in training; never trained

each with the leading axes that W has (of a stack's repeats, of experts). What a model computes
follows from which leaves it is given; nothing else says that it is adapted.
"""

import dataclasses
import difflib
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.quantised import HELD
from jaxllm.models.quantised import SCALE as QUANTISED_SCALE
from jaxllm.sharding.rules import Rules

A, B, MAGNITUDE = "_lora_a", "_lora_b", "_lora_magnitude"
SCALE, DROPOUT = "_lora_scale", "_lora_dropout"

SUFFIXES = (A, B, SCALE, MAGNITUDE, DROPOUT)
TRAINED = rf".*({A}|{B}|{MAGNITUDE})"
"""Matches the paths of the leaves of pairs that are trained,"""
PAIRS = rf".*({'|'.join(SUFFIXES)})"
"""and of all their leaves."""

_CONSTANT = rf".*({SCALE}|{DROPOUT})"
_MATRIX = r"(.*/)?(kernel|embedding|output)"
_OF_EXPERTS = r".*/experts/.*"
_SHOWN = 4  # paths in a message


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank pairs, which are trained in the place of the matrices beside them."""

    rank: int = 0
    """Columns of the first and rows of the second matrix of a pair; 0: there are no pairs."""
    alpha: float = 16.0
    """What a pair adds is multiplied by alpha / rank."""
    pattern: str = r".*(attention/[a-z_]+|mlp/(gate|up|down))/kernel"
    """The matrices that get one, by their whole path: attention and MLP. Others are those of
    experts, `.*/experts/.*`; `embedding`; and `output`, which is none where it is tied."""
    dropout: float = 0.0
    """Share of a pair's input set to zero in training; not of experts, `embedding` and `output`."""
    rslora: bool = False
    """Multiply by alpha / √rank instead, which keeps large ranks from learning slower."""
    dora: bool = False
    """Train the length of each column of the matrix apart from its direction."""
    base: str = ""
    """How the frozen matrices are held: `bfloat16`, or those of attention and MLP in `int8` or
    `nf4`, 8 and 4 bits (QLoRA; needs the extra `quantised`); empty: as `model.param_dtype`."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError("rank: must not be negative")
        if self.base not in HELD:
            known = ", ".join(filter(None, HELD))
            raise ValueError(f"base: must be one of {known}, and was given {self.base!r}")
        if self.base and not self.rank:
            raise ValueError("base: is for low-rank pairs, which are trained beside it; give rank")
        if self.alpha <= 0:
            raise ValueError("alpha: must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: must be in [0, 1)")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: is no regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def trained_pattern(asked: str, config: LoraConfig) -> str:
    """The pattern of the parameters to train, of `train.trainable`: pairs, and a head if there is
    one, unless it says otherwise; never scale or dropout."""
    if not config.rank:
        return asked
    return f"{TRAINED}|head/.*" if asked in (".*", "lora") else f"(?!{_CONSTANT}$)(?:{asked})"


def kept_pattern(asked: str, config: LoraConfig) -> str:
    """The pattern of the parameters that checkpoints hold: with pairs, all but the frozen base."""
    return f"{trained_pattern(asked, config)}|{PAIRS}" if config.rank else ".*"


class Pair(NamedTuple):
    """What stands beside one matrix; or beside that of each row of a batch, along an axis of its
    own (`jaxllm.inference.adapters`)."""

    a: Float[Array, "*lead in rank"]
    b: Float[Array, "*lead rank out"]
    scale: Float[Array, "*lead"]
    magnitude: Float[Array, "*lead out"] | None = None
    dropout: Float[Array, "*lead"] | None = None

    @property
    def product(self) -> Float[Array, "*lead in out"]:
        """s·A·B, in float32."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision="highest")
        return self.scale[..., None, None].astype(jnp.float32) * product


def adapted_path(path: str) -> str:
    """The path of the matrix that a leaf of a pair stands beside; of another leaf, its own."""
    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")
    return path.removesuffix(suffix)


def pair_of(leaves: Mapping[str, Any], path: str) -> Pair | None:
    """The pair beside the matrix at a path, if there is one among leaves by path."""
    if path + A not in leaves:
        return None
    trained = leaves[path + A], leaves[path + B]
    return Pair(
        *trained, leaves[path + SCALE], leaves.get(path + MAGNITUDE), leaves.get(path + DROPOUT)
    )


def pair_beside(module: nn.Module, name: str) -> Pair | None:
    """The pair beside a parameter of a module, if its scope holds one."""
    if not module.has_variable("params", name + A):
        return None
    return Pair(*(module.get_variable("params", name + suffix) for suffix in SUFFIXES))


def pair_shapes(shapes: trees.Tree, config: LoraConfig) -> dict[str, Any]:
    """The leaves that `config` puts beside the matrices of a model, as `jax.ShapeDtypeStruct`s.

    Args:
        shapes: the model's parameters, as arrays or shapes.
        config: with a positive rank.

    Raises:
        UserError: the pattern matches no matrix; paths that are near are named.
    """
    matrices = {
        path: leaf
        for path, leaf in trees.leaves_with_paths(shapes)
        if re.fullmatch(_MATRIX, path) and len(leaf.shape) > 1
    }
    chosen = {p: leaf for p, leaf in matrices.items() if re.fullmatch(config.pattern, p)}
    if not chosen:
        raise UserError(
            f"config.lora.pattern: {config.pattern!r} matches no matrix of the model; there are "
            f"{', '.join(_nearest(config.pattern, list(matrices)))}."
        )
    experts = next((path for path in chosen if re.fullmatch(_OF_EXPERTS, path)), "")
    if config.dora and experts:
        raise UserError(
            f"config.lora.dora: {experts} is of experts, whose columns DoRA cannot scale here; "
            "leave them out of config.lora.pattern."
        )
    found: dict[str, Any] = {}
    for path, leaf in chosen.items():
        *lead, rows, columns = leaf.shape
        own = {
            A: (*lead, rows, config.rank),
            B: (*lead, config.rank, columns),
            SCALE: tuple(lead),
        }
        own |= {MAGNITUDE: (*lead, columns)} if config.dora else {}
        inside = path.endswith("kernel") and not re.fullmatch(_OF_EXPERTS, path)
        own |= {DROPOUT: tuple(lead)} if config.dropout and inside else {}
        for suffix, shape in own.items():
            trees.insert(found, path + suffix, jax.ShapeDtypeStruct(shape, jnp.float32))
    return found


def init_pairs(params: trees.Tree, config: LoraConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Leaves that change nothing yet: A uniform in ±1/√in, B zero, m the length of W's columns.

    Args:
        params: the model's parameters.
        config: with a positive rank.
        key: of A.

    Raises:
        UserError: as `pair_shapes`.
    """
    leaves = dict(trees.leaves_with_paths(params))
    shapes = dict(trees.leaves_with_paths(pair_shapes(params, config)))

    def made(path: str) -> Array:
        shape = shapes[path].shape
        if path.endswith(A):
            bound, own = shape[-2] ** -0.5, jax.random.fold_in(key, zlib.crc32(path.encode()))
            return jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        if path.endswith((SCALE, DROPOUT)):
            value = config.scale if path.endswith(SCALE) else config.dropout
            return jnp.full(shape, value, jnp.float32)
        if path.endswith(MAGNITUDE):
            return _lengths(leaves[path.removesuffix(MAGNITUDE)])
        return jnp.zeros(shape, jnp.float32)

    found: dict[str, Any] = {}
    for path in shapes:
        trees.insert(found, path, made(path))
    return found


def merged(params: trees.Tree) -> dict[str, Any]:
    """The parameters with every pair added into its matrix, which keeps its dtype."""
    leaves = dict(trees.leaves_with_paths(params))
    result: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if re.fullmatch(PAIRS, path):
            continue
        if pair := pair_of(leaves, path):
            leaf = adapted(leaf, pair).astype(leaf.dtype)
        trees.insert(result, path, leaf)
    return result


def adapted(kernel: Float[Array, "*lead in out"], pair: Pair) -> Float[Array, "*lead in out"]:
    """The matrix that kernel and pair stand for, float32."""
    whole = kernel.astype(jnp.float32) + pair.product
    if pair.magnitude is not None:
        whole = whole * (pair.magnitude / _lengths(whole))[..., None, :]
    return whole


def column_factors(kernel: Float[Array, "in out"], pair: Pair) -> Float[Array, " out"]:
    """DoRA's m / ‖W + s·A·B‖, by columns; the length counts as a constant (section 4.3)."""
    assert pair.magnitude is not None
    whole = jax.lax.stop_gradient(kernel.astype(jnp.float32) + pair.product)
    return pair.magnitude / _lengths(whole)


def with_pairs(rules: Rules) -> Rules:
    """Sharding rules by which pairs, and the scales of quantised matrices, lie as their matrices
    do; the rank is never split."""
    found: list[tuple[str, PartitionSpec]] = []
    for pattern, spec in rules:
        if re.search(r"(kernel|embedding|output)$", pattern):
            *lead, rows, columns = spec
            found += [
                (pattern + A, PartitionSpec(*lead, rows, None)),
                (pattern + B, PartitionSpec(*lead, None, columns)),
                (pattern + f"({SCALE}|{DROPOUT})", PartitionSpec(*lead)),
                (pattern + MAGNITUDE, PartitionSpec(*lead, columns)),
                # Blocks of rows are few, and need not be divisible as the rows are.
                (pattern + QUANTISED_SCALE, PartitionSpec(*lead, None, columns)),
            ]
    return [*rules, *found]


def _lengths(matrix: Float[Array, "*lead in out"]) -> Float[Array, "*lead out"]:
    return jnp.linalg.norm(matrix.astype(jnp.float32), axis=-2)


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """The paths that look the most like a pattern."""

    def likeness(path: str) -> float:
        return difflib.SequenceMatcher(None, pattern, path).ratio()

    return sorted(paths, key=likeness, reverse=True)[:_SHOWN]
