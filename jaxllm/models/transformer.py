"""The decoder: embedding, scanned stacks of layers, final norm. It returns hidden states.

Heads and losses read the hidden states: `output_matrix` gives the projection to the vocabulary,
and `jaxllm.ops.vocabulary` turns both into log-probabilities.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm import trees
from jaxllm.models.config import StackConfig, TransformerConfig
from jaxllm.models.layers import Context, KeyValue, Layer, RMSNorm
from jaxllm.sharding.mesh import BATCH_AXES, constrain

# One entry a stack, one a layer of its unit; the arrays lead with the stack's repeats.
Cache = tuple[tuple[KeyValue, ...], ...]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Kernels of a stack are [repeats, in, out].
SHARDING_RULES = (
    (r"embedding", PartitionSpec("tensor", "fsdp")),
    (r"output", PartitionSpec("fsdp", "tensor")),
    (r"stack_\d+/.*/(query|key|value|gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"stack_\d+/.*/(output|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*norm/scale", PartitionSpec()),
)


class Unit(nn.Module):
    """The layers that a stack repeats, one after another."""

    stack: StackConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        cache: tuple[KeyValue, ...] | None,
        context: Context,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[KeyValue | None, ...]]:
        written = []
        for index, config in enumerate(self.stack.unit):
            layer = Layer(config, name=f"layer_{index}")
            x, layer_cache = layer(x, context, None if cache is None else cache[index])
            written.append(layer_cache)
        return x, tuple(written)


class Transformer(nn.Module):
    """A decoder-only Transformer.

    Parameters: `embedding` [vocab, width]; `stack_I/layer_J/...`, each with a leading axis of
    the stack's repeats; `final_norm/scale`; and `output` [width, vocab] unless tied.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """Last hidden states, in the compute dtype, and the cache with these tokens written in.

        Args:
            tokens: ids in [0, vocab_size).
            positions: position of each token within its segment; with a cache also the slot
                that it is written to.
            segment_ids: tokens see only their own segment; 0 is padding. With a cache the
                segment is 1.
            cache: from `empty_cache`, or None to attend within `tokens` alone.
        """
        config = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (config.vocab_size, config.width)
        )
        if not config.tied:
            self.param("output", nn.initializers.normal(0.02), (config.width, config.vocab_size))
        x = jnp.take(embedding, tokens, axis=0).astype(config.dtype)
        x = constrain(x, BATCH_AXES)
        context = Context(positions, segment_ids)
        written = []
        for index, stack in enumerate(config.stacks):
            scanned = self._scanned(stack, name=f"stack_{index}")
            x, stack_cache = scanned(x, None if cache is None else cache[index], context)
            written.append(stack_cache)
        hidden = RMSNorm(config.norm_eps, name="final_norm")(x)
        return hidden, None if cache is None else tuple(written)

    def _scanned(self, stack: StackConfig, name: str) -> nn.Module:
        """The unit of a stack, scanned over its repeats."""
        unit = Unit
        if self.config.remat != "none":
            unit = nn.remat(unit, prevent_cse=False, policy=_REMAT_POLICIES[self.config.remat])
        scanned = nn.scan(
            unit,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=stack.repeats,
            # The check traces each layer once more, and refuses the callbacks of a diagnosis.
            check_constancy_invariants=False,
        )
        return scanned(stack, name=name)


def init_params(config: TransformerConfig, key: jax.Array) -> dict:
    """Random float32 parameters. Jit it with `out_shardings` to create them in place."""
    token = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, token, token, token)["params"]


def param_shapes(config: TransformerConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def output_matrix(params: trees.Tree) -> Float[Array, "embed vocab"]:
    """The projection from hidden states to the vocabulary."""
    return params["output"] if "output" in params else params["embedding"].T


def empty_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """A zeroed key-value cache of `length` positions for each of `batch` rows."""

    def layer(stack: StackConfig, index: int) -> KeyValue:
        attention = stack.unit[index].attention
        shape = (stack.repeats, batch, length, attention.kv_heads, attention.head_dim)
        return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return tuple(
        tuple(layer(stack, index) for index in range(len(stack.unit))) for stack in config.stacks
    )
