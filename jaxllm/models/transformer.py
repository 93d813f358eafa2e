"""The Transformer: embedding, scanned stacks of layers, final norm. It returns hidden states.

Heads and losses read the hidden states: `output_head` gives the projection to the vocabulary,
and `jaxllm.ops.vocabulary` turns both into log-probabilities.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.attention import Context
from jaxllm.models.config import StackConfig, TransformerConfig
from jaxllm.models.head import init_head
from jaxllm.models.intermediates import COLLECTIONS
from jaxllm.models.kv_cache import Cache, LayerCache
from jaxllm.models.layers import Layer, RouterLosses
from jaxllm.models.lora import (
    Pair,
    adapted,
    column_factors,
    pair_beside,
    pair_of,
    with_pairs,
)
from jaxllm.models.parts import Norm, dropout
from jaxllm.ops.lookup import lookup
from jaxllm.ops.products import PRODUCT, product
from jaxllm.ops.rotary import rotation
from jaxllm.ops.vocabulary import OutputHead
from jaxllm.sharding.mesh import BATCH_AXES, constrain

_CUDNN_ATTENTION = "dot_product_attention_fwd"

# Of both tables, as they are drawn.
EMBEDDING_DEVIATION = 0.02

# Kernels of a stack are [repeats, in, out], those of experts [repeats, experts, in, out].
_MATRIX_RULES = (
    (r"embedding", PartitionSpec("tensor", "fsdp")),
    (r"position_embedding", PartitionSpec(None, "fsdp")),
    (r"output", PartitionSpec("fsdp", "tensor")),
    (r"stack_\d+/.*/experts/(gate|up)/kernel", PartitionSpec(None, "expert", "fsdp", "tensor")),
    (r"stack_\d+/.*/experts/down/kernel", PartitionSpec(None, "expert", "tensor", "fsdp")),
    (r"stack_\d+/.*/router/kernel", PartitionSpec(None, "fsdp", None)),
    # Every head reads the whole latent.
    (r"stack_\d+/.*/(query|latent)_down/kernel", PartitionSpec(None, "fsdp", None)),
    (r"stack_\d+/.*/(query|key|value|gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"stack_\d+/.*/(query|key|value|gate|up)/bias", PartitionSpec(None, "tensor")),
    (r"stack_\d+/.*/(output|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"stack_\d+/.*/(output|down)/bias", PartitionSpec()),
    (r".*norm/(scale|bias)", PartitionSpec()),
    (r"head/kernel", PartitionSpec("fsdp", None)),
    (r"head/bias", PartitionSpec()),
    # Of a student's inner states to its teacher's.
    (r"projections/hidden", PartitionSpec(None, "fsdp", None)),
    (r"projections/attention", PartitionSpec()),
)
# Those of other models, which an objective may hold beside it, lie as the model's do.
SHARDING_RULES = [
    (f"(?:(?:policy|value|reference|teacher)/)?{pattern}", spec)
    for pattern, spec in with_pairs(_MATRIX_RULES)
]


def _keeps_products(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Whether the backward pass is to have what an operation gives, rather than compute it again:
    products, and what cuDNN's attention gives, which nothing can name from outside."""
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return named(primitive, *inputs, **params) or primitive.name.startswith(_CUDNN_ATTENTION)


_REMAT_POLICIES = {
    "dots": _keeps_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: Float[Array, "batch seq embed"]
    """Last hidden states, in the compute dtype."""
    cache: Cache | None
    """The cache with these tokens written in."""
    router: RouterLosses | None
    """Of the mean layer with experts, for each row; None where there are no experts."""


class Unit(nn.Module):
    """The layers that a stack repeats, one after another."""

    stack: StackConfig
    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        repeat: tuple[Int[Array, ""], tuple[LayerCache, ...] | None],
        context: Context,
    ) -> tuple[
        Float[Array, "batch seq embed"],
        tuple[tuple[LayerCache | None, ...], tuple[RouterLosses, ...]],
    ]:
        """`repeat` is the number of the unit's first layer, and its part of the cache."""
        first, cache = repeat
        written, losses = [], []
        for index, layer_config in enumerate(self.stack.unit):
            layer = Layer(layer_config, self.config.dtypes, name=f"layer_{index}")
            own = context._replace(dropout_keys=_folded(context.dropout_keys, first + index))
            x, layer_cache, loss = layer(x, own, None if cache is None else cache[index])
            written.append(layer_cache)
            losses += [] if loss is None else [loss]
        return x, (tuple(written), tuple(losses))


class Transformer(nn.Module):
    """A Transformer of one tower: a decoder, or, where nothing is causal, an encoder.

    Parameters: `embedding` [vocab, width]; `position_embedding` [max_positions, width] where
    positions are learned; `stack_I/layer_J/...`, each with a leading axis of the stack's
    repeats; `final_norm/...`; and `output` [width, vocab] unless tied.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"],
        cache: Cache | None = None,
        *,
        prefix: Int[Array, "batch seq"] | None = None,
        dropout_keys: Key[Array, " batch"] | None = None,
    ) -> Output:
        """Hidden states of a batch of rows.

        Args:
            tokens: ids in [0, vocab_size).
            positions: position of each token within its segment. Without a cache, segments are
                runs of tokens in which positions rise by one.
            segment_ids: tokens see only their own segment; 0 is padding. With a cache, which
                holds one text a row, the others are 1.
            cache: from `kv_cache.empty_cache`, or None to attend within `tokens` alone.
            prefix: length of the beginning of the token's segment that all of the segment sees.
            dropout_keys: a key a row; None drops nothing.
        """
        config = self.config
        x = self._embedded(tokens, positions)
        x = constrain(dropout(x, config.embedding_dropout, dropout_keys, "embedding"), BATCH_AXES)
        # In the order of the layers: that of a set would be another in the next process, and
        # another program for the compilation cache.
        rotary = dict.fromkeys(layer.attention.rotary for layer in config.unrolled)
        rotations = {kind: rotation(positions, kind) for kind in rotary if kind}
        context = Context(positions, segment_ids, rotations, prefix, dropout_keys)
        written, losses, first = [], [], 0
        for index, stack in enumerate(config.stacks):
            numbers = first + len(stack.unit) * jnp.arange(stack.repeats)
            once = stack.repeats == 1 and cache is not None
            layers = self._once if once else self._scanned
            x, (stack_cache, stack_losses) = layers(stack, name=f"stack_{index}")(
                x, (numbers, None if cache is None else cache[index]), context
            )
            written.append(stack_cache)
            losses += stack_losses
            first += stack.repeats * len(stack.unit)
        hidden = Norm(config.norm, config.dtypes, name="final_norm")(x)
        return Output(hidden, None if cache is None else tuple(written), self._mean(losses))

    def _embedded(
        self, tokens: Int[Array, "batch seq"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        config = self.config
        dtype, params = config.dtypes.compute, jnp.dtype(config.dtypes.params)
        drawn = nn.initializers.normal(EMBEDDING_DEVIATION)
        shape = (config.vocab_size, config.width)
        embedding = self.param("embedding", drawn, shape, params)
        if not config.tied:
            self.param("output", drawn, shape[::-1], params)
        x = lookup(embedding, tokens, dtype)
        if pair := pair_beside(self, "embedding"):
            x = _with_pair(x, embedding, pair, tokens)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, dtype)
        if config.learned_positions:
            shape = (config.learned_positions, config.width)
            table = self.param("position_embedding", drawn, shape, params)
            # Slots of padding may lie beyond the table; nobody reads what they hold.
            x = x + lookup(table, jnp.minimum(positions, len(table) - 1), dtype)
        if config.sinusoidal:
            # As large as the embedded tokens at the start: they would drown beside a sine of 1.
            deviation = EMBEDDING_DEVIATION * config.embedding_scale
            waves = 2**0.5 * deviation * sinusoids(positions, config.width)
            x = x + waves.astype(dtype)
        return x

    def _scanned(self, stack: StackConfig, name: str) -> nn.Module:
        """The unit of a stack, scanned over its repeats."""
        unit = Unit
        if self.config.remat != "none":
            unit = nn.remat(unit, prevent_cse=False, policy=_REMAT_POLICIES[self.config.remat])
        scanned = nn.scan(
            unit,
            variable_axes=dict.fromkeys(("params", *COLLECTIONS), 0),
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=stack.repeats,
            # The check traces each layer once more, and refuses the callbacks of a diagnosis.
            check_constancy_invariants=False,
        )
        return scanned(stack, self.config, name=name)

    def _once(self, stack: StackConfig, name: str) -> Callable:
        """The unit of a stack that is not repeated, without a loop, which would copy the cache."""

        def run(
            x: Array, repeat: tuple[Int[Array, " 1"], tuple[LayerCache, ...]], context: Context
        ) -> tuple[Array, Any]:
            (first, *_), cache = repeat
            strip = partial(jax.tree.map, lambda leaf: leaf[0])
            unit = nn.map_variables(Unit, "params", trans_in_fn=strip)
            x, (written, losses) = unit(stack, self.config, name=name)(x, (first, cache), context)
            return x, (written, jax.tree.map(lambda leaf: leaf[None], losses))

        return run

    def _mean(self, losses: list[RouterLosses]) -> RouterLosses | None:
        """The router losses of the mean layer, from those of each, [repeats, batch]."""
        if not losses:
            return None
        layers = sum(loss.load_balance.shape[0] for loss in losses)
        total = jax.tree.map(lambda *leaves: sum(leaf.sum(0) for leaf in leaves), *losses)
        return jax.tree.map(lambda leaf: leaf / layers, total)


def sinusoids(positions: Int[Array, "batch seq"], width: int) -> Float[Array, "batch seq {width}"]:
    """Sines, then cosines, of positions · 10000^(-2i/width) (Vaswani et al. 2017, section 3.5,
    https://arxiv.org/abs/1706.03762, there interleaved); float32."""
    half = -(-width // 2)
    angles = positions[..., None] * 10_000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


def init_params(config: TransformerConfig, key: jax.Array) -> dict:
    """Random parameters. Jit it with `out_shardings` to create them in place."""
    token = jnp.zeros((1, 1), jnp.int32)
    params = Transformer(config).init(key, token, token, token)["params"]
    return params | init_head(config) if config.head.outputs else params


def param_shapes(config: TransformerConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def output_head(config: TransformerConfig, params: trees.Tree) -> OutputHead:
    """What projects hidden states to the vocabulary."""
    name = "output" if "output" in params else "embedding"
    matrix = params[name]
    if pair := pair_of(params, name):
        matrix = adapted(matrix, pair)
    matrix = matrix if name == "output" else matrix.T
    return OutputHead(matrix, config.logit_soft_cap, config.dtypes.reduction)


def _with_pair(
    x: Float[Array, "batch seq embed"],
    table: Float[Array, "entries embed"],
    pair: Pair,
    ids: Int[Array, "batch seq"],
) -> Float[Array, "batch seq embed"]:
    """Rows x of a table with what the pair beside it adds to them."""
    thin = lookup(pair.a, ids, str(x.dtype))
    wide = x.astype(jnp.float32) + pair.scale * product(thin, pair.b, "float32")
    if pair.magnitude is not None:
        wide = wide * column_factors(table, pair)
    return wide.astype(x.dtype)


def check_length(config: TransformerConfig, length: int, field: str) -> None:
    """Checks that the model is made for rows of `length` tokens, as `field` asks for.

    Raises:
        UserError: it is not.
    """
    if config.max_positions and length > config.max_positions:
        raise UserError(
            f"{field}: {length:,} tokens are more than the {config.max_positions:,} positions "
            "that the model is made for (config.model.max_positions)."
        )


def _folded(
    keys: Key[Array, " batch"] | None, number: Int[Array, ""]
) -> Key[Array, " batch"] | None:
    """Keys of one layer, from those of the rows."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
