"""A smaller model out of a larger one: some of its layers, and of these some of the channels, heads
and MLP units, those whose weights are largest (as Li et al. 2016 choose filters,
https://arxiv.org/abs/1608.08710).

What is kept stands in the order in which it was. Channels are the same through all of the model, as
the residual stream is one; heads and units are chosen in each layer.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    StackConfig,
    TransformerConfig,
)
from jaxllm.models.families import completed
from jaxllm.models.stacks import layer_of, restacked

SIZES = ("layers", "width", "heads", "kv_heads", "mlp_width")
"""Fields of the model in which a part may be smaller."""

CHANNELS, UNITS, HEADS, KV_HEADS = "channels", "units", "heads", "kv_heads"
Roles = tuple[str | None, ...]
"""What stands along each axis of a parameter; None: what every part has whole."""
Chosen = dict[str, tuple[int, Int[Array, " chosen"]]]
"""Of each role how many there are, and which of them are kept."""
_LEAST = 1e-30

_TABLES: tuple[tuple[str, Roles], ...] = (
    (r"(position_)?embedding", (None, CHANNELS)),
    (r"output", (CHANNELS, None)),
    (r"final_norm/.*", (CHANNELS,)),
)
_LAYERS: tuple[tuple[str, Roles], ...] = (
    (r"(attention|mlp)(_post)?_norm/.*", (CHANNELS,)),
    (r"attention/query/kernel", (CHANNELS, HEADS)),
    (r"attention/query/bias", (HEADS,)),
    (r"attention/(key|value)/kernel", (CHANNELS, KV_HEADS)),
    (r"attention/(key|value)/bias", (KV_HEADS,)),
    (r"attention/output/kernel", (HEADS, CHANNELS)),
    (r"(attention/output|mlp/down)/bias", (CHANNELS,)),
    (r"attention/(query|key)_norm/.*", (None,)),
    (r"mlp/(up|gate)/kernel", (CHANNELS, UNITS)),
    (r"mlp/(up|gate)/bias", (UNITS,)),
    (r"mlp/down/kernel", (UNITS, CHANNELS)),
    (r"mlp/router/kernel", (CHANNELS, None)),
    (r"mlp/experts/(gate|up)/kernel", (None, CHANNELS, None)),
    (r"mlp/experts/down/kernel", (None, None, CHANNELS)),
)
# Of keys and values every head reads the whole latent.
_LATENT: tuple[tuple[str, Roles], ...] = (
    (r"attention/(query|latent)_down/kernel", (CHANNELS, None)),
    (r"attention/(query|latent)_norm/.*", (None,)),
    (r"attention/(key|value)/kernel", (None, HEADS)),
    *_LAYERS,
)
_COMPRESSED_QUERIES: tuple[tuple[str, Roles], ...] = (
    (r"attention/query/kernel", (None, HEADS)),
    *_LATENT,
)


def part_of(given: ModelConfig, whole: ModelConfig) -> ModelConfig:
    """The model of a part: `whole` in the layers, width and heads given, with heads as wide as they
    were. Where `kv_heads` is 0 as many query heads share keys and values as did, and where
    `mlp_width` is 0 an MLP has the share of its width that channels have of theirs.

    Raises:
        UserError: a size is more than that of the whole, or none is less, or they do not go
            together.
    """
    theirs = completed(whole)
    sizes: dict[str, Any] = {name: getattr(given, name) for name in SIZES}
    if theirs.kv_heads and not given.kv_heads:
        sizes["kv_heads"] = max(1, given.heads * theirs.kv_heads // theirs.heads)
    if not given.mlp_width:
        share = theirs.mlp_width if theirs.experts else theirs.mlp_width * given.width
        sizes["mlp_width"] = share if theirs.experts else max(1, share // theirs.width)
    kept: dict[str, Any] = {"head_dim": theirs.head_dim, "value_head_dim": theirs.value_head_dim}
    for name, size in sizes.items():
        if size > getattr(theirs, name):
            raise UserError(
                f"config.model.{name}: a part has at most the {getattr(theirs, name)} of the whole "
                f"model, and {size} were given."
            )
    if all(size == getattr(theirs, name) for name, size in sizes.items()):
        raise UserError(
            f"config.model: a part is smaller than the whole, and these are its sizes: give less "
            f"in one of {', '.join(SIZES)}."
        )
    if theirs.experts and sizes["mlp_width"] != theirs.mlp_width:
        raise UserError(
            f"config.model.mlp_width: experts keep their width, {theirs.mlp_width}; leave it out."
        )
    try:
        part = dataclasses.replace(whole, **sizes, **kept)
    except ValueError as error:
        raise UserError(f"config.model.{error}.") from None
    if theirs.kv_heads and part.heads // part.kv_heads > theirs.heads // theirs.kv_heads:
        raise UserError(
            f"config.model.kv_heads: {part.heads // part.kv_heads} query heads would share keys "
            f"and values, and of the whole model {theirs.heads // theirs.kv_heads} do; give more "
            "kv_heads, or fewer heads."
        )
    return part


def part_layers(
    named: Sequence[int], whole: TransformerConfig, part: TransformerConfig, field: str
) -> list[int]:
    """The layer of the whole, counted from 0, that each of the part's is taken from.

    Args:
        named: layers as they are configured, counted from 1; empty: evenly spaced, the first and
            the last among them, but each one that attends as the part's does.
        whole, part: the models.
        field: where `named` is configured, for messages.

    Raises:
        UserError: there are not so many, they do not rise, or one attends otherwise.
    """
    if not named:
        return _evenly(whole, part, field)
    if len(named) != part.layers:
        raise UserError(
            f"{field}: names {len(named)} layers, and each of the part's {part.layers} is taken "
            "from one; name as many."
        )
    if list(named) != sorted(set(named)) or named[0] < 1 or named[-1] > whole.layers:
        raise UserError(
            f"{field}: layers are counted from 1, rise, and end at {whole.layers} at the latest."
        )
    for number, taken in enumerate(named):
        if not _alike(whole, taken - 1, part, number):
            raise UserError(
                f"{field}: layer {taken} of the whole model attends in another way than layer "
                f"{number + 1} of the part, as one with a window and one without; name one that is "
                "like it."
            )
    return [taken - 1 for taken in named]


def _evenly(whole: TransformerConfig, part: TransformerConfig, field: str) -> list[int]:
    taken: list[int] = []
    for number in range(part.layers):
        wanted = number * (whole.layers - 1) / max(part.layers - 1, 1)
        first = taken[-1] + 1 if taken else 0
        left = [index for index in range(first, whole.layers) if _alike(whole, index, part, number)]
        if not left:
            raise UserError(
                f"{field}: there is no layer left that attends as layer {number + 1} of the part "
                "does; name the layers, or take fewer."
            )
        taken.append(min(left, key=lambda index: abs(index - wanted)))
    return taken


def _alike(whole: TransformerConfig, taken: int, part: TransformerConfig, number: int) -> bool:
    """Whether two layers attend in the same way, but for how many heads they have."""
    theirs, ours = whole.unrolled[taken].attention, part.unrolled[number].attention
    sizes: dict[str, Any] = {"heads": ours.heads, "backend": ours.backend}
    if isinstance(ours, AttentionConfig):
        sizes["kv_heads"] = ours.kv_heads
    return dataclasses.replace(theirs, **sizes) == ours


def pruned(
    params: trees.Tree, whole: TransformerConfig, part: TransformerConfig, layers: Sequence[int]
) -> dict[str, Any]:
    """The parameters of a part of a model, in its own dtype; jittable.

    Args:
        params: of the whole.
        whole: the model.
        part: the model that `part_of` gives.
        layers: for each layer of the part the layer of the whole that it is taken from, counted
            from 0.
    """
    tables = {name: leaf for name, leaf in params.items() if not name.startswith("stack_")}
    taken = [
        (layer_of(params, whole.stacks, number), whole.unrolled[number], layer)
        for number, layer in zip(layers, part.unrolled, strict=True)
    ]
    weights = list(_with_roles(tables, _TABLES))
    for layer, config, _ in taken:
        weights += _with_roles(layer, _table_of(config))
    channels = {
        CHANNELS: (whole.width, _largest(_sizes(weights, CHANNELS, whole.width), part.width))
    }
    found = _cut(tables, _TABLES, channels)
    unit = {
        f"layer_{number}": _cut(layer, _table_of(config), channels | _inside(layer, config, wanted))
        for number, (layer, config, wanted) in enumerate(taken)
    }
    found["stack_0"] = jax.tree.map(lambda leaf: leaf[None], unit)
    stacked = restacked(found, (StackConfig(1, part.unrolled),), part.stacks)
    return jax.tree.map(lambda leaf: leaf.astype(part.dtypes.params), stacked)


def _inside(layer: trees.Tree, config: LayerConfig, wanted: LayerConfig) -> Chosen:
    """The heads and units that a layer keeps."""
    weights = list(_with_roles(layer, _table_of(config)))
    heads = config.attention.heads
    chosen: Chosen = {}
    if isinstance(config.attention, LatentAttentionConfig):
        kept = _largest(_sizes(weights, HEADS, heads), wanted.attention.heads)
        chosen[HEADS] = (heads, kept)
    else:
        assert not isinstance(wanted.attention, LatentAttentionConfig)
        kv_heads, kv_kept = config.attention.kv_heads, wanted.attention.kv_heads
        by_group = _sizes(weights, HEADS, heads).reshape(kv_heads, -1)
        groups = _largest(_sizes(weights, KV_HEADS, kv_heads) + by_group.sum(1), kv_kept)
        # Those that share keys and values still do.
        kept = _largest(by_group[groups], wanted.attention.heads // kv_kept)
        kept = (groups[:, None] * by_group.shape[1] + kept).reshape(-1)
        chosen |= {HEADS: (heads, kept), KV_HEADS: (kv_heads, groups)}
    if isinstance(config.mlp, MlpConfig):
        units = _sizes(weights, UNITS, config.mlp.width)
        chosen[UNITS] = (config.mlp.width, _largest(units, wanted.mlp.width))
    return chosen


def _table_of(config: LayerConfig) -> tuple[tuple[str, Roles], ...]:
    if not isinstance(config.attention, LatentAttentionConfig):
        return _LAYERS
    return _COMPRESSED_QUERIES if config.attention.query_latent_width else _LATENT


def _with_roles(
    tree: trees.Tree, table: Sequence[tuple[str, Roles]]
) -> Iterable[tuple[Array, Roles]]:
    return ((leaf, trees.match(table, path)) for path, leaf in trees.leaves_with_paths(tree))


def _sizes(
    weights: Iterable[tuple[Array, Roles]], role: str, count: int
) -> Float[Array, " {count}"]:
    """How large the matrices are at each of what stands for a role: their mean squares there over
    those of the whole matrix, summed over matrices."""
    total = jnp.zeros(count)
    for leaf, roles in weights:
        if leaf.ndim > 1 and role in roles:
            rows = jnp.moveaxis(leaf, roles.index(role), 0).reshape(count, -1)
            squares = jnp.mean(jnp.square(rows.astype(jnp.float32)), axis=1)
            total += squares / jnp.maximum(jnp.mean(squares), _LEAST)
    return total


def _largest(sizes: Float[Array, "*groups n"], count: int) -> Int[Array, "*groups {count}"]:
    return jnp.sort(jax.lax.top_k(sizes, count)[1], axis=-1)


def _cut(tree: trees.Tree, table: Sequence[tuple[str, Roles]], chosen: Chosen) -> dict[str, Any]:
    """The tree with what is kept along each axis."""

    def cut(path: str, leaf: Array) -> Array:
        for axis, role in enumerate(trees.match(table, path)):
            if role and role in chosen:
                count, kept = chosen[role]
                block = leaf.shape[axis] // count
                places = (kept[:, None] * block + jnp.arange(block)).reshape(-1)
                leaf = jnp.take(leaf, places, axis=axis)
        return leaf

    cut_tree: dict[str, Any] = trees.map_with_paths(cut, tree)
    return cut_tree
