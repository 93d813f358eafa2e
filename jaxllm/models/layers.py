"""A decoder layer: attention and MLP, or experts, on the residual stream."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxllm.models.attention import Attention, Context
from jaxllm.models.config import (
    DTypes,
    LatentAttentionConfig,
    LayerConfig,
    MixtureConfig,
    MlpConfig,
)
from jaxllm.models.intermediates import HIDDEN, record
from jaxllm.models.kv_cache import LayerCache
from jaxllm.models.latent_attention import LatentAttention
from jaxllm.models.lora import pair_beside
from jaxllm.models.parts import ACTIVATIONS, Linear, Norm, dropout
from jaxllm.ops.experts import ExpertKernels, expert_mlp, route
from jaxllm.sharding.mesh import BATCH_AXES, constrain


class RouterLosses(NamedTuple):
    """What a mixture adds to the loss, summed over each row's tokens (`jaxllm.ops.experts`)."""

    load_balance: Float[Array, " batch"]
    router_z: Float[Array, " batch"]


class Mlp(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202), or, without
    a gate, down(act(up(x)))."""

    config: MlpConfig
    dtypes: DTypes
    zero_init: bool = True
    """Whether the last matrix begins at zero."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq embed"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch seq embed"]:
        """`dropout_keys`, one a row, are for what low-rank pairs drop."""
        config = self.config
        activate = ACTIVATIONS[config.activation]
        inner = Linear(config.width, self.dtypes, config.bias, name="up")(x, dropout_keys)
        if config.gated:
            gate = Linear(config.width, self.dtypes, config.bias, name="gate")(x, dropout_keys)
            inner = activate(gate) * inner
        else:
            inner = activate(inner)
        inner = constrain(inner, BATCH_AXES, None, "tensor")
        down = Linear(x.shape[-1], self.dtypes, config.bias, self.zero_init, name="down")
        return down(inner, dropout_keys)


class Mixture(nn.Module):
    """Σ over the chosen experts of weight · MLP(x) (Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538); no token is dropped."""

    config: MixtureConfig
    dtypes: DTypes
    zero_init: bool = True
    """Whether the last matrix of every expert begins at zero."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq embed"], segment_ids: Int[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq embed"], RouterLosses]:
        config, embed = self.config, x.shape[-1]
        scores = Linear(config.experts, self.dtypes, result_dtype="float32", name="router")(x)
        routing = route(
            scores, config.per_token, normalise=config.normalise, counted=segment_ids > 0
        )
        gate, up, down = _Experts(config, embed, self.dtypes, self.zero_init, name="experts")()
        mixed = expert_mlp(
            x,
            routing.choices,
            routing.weights,
            gate,
            up,
            down,
            ACTIVATIONS[config.activation],
            self.dtypes.reduction,
        )
        return mixed, RouterLosses(routing.load_balance, routing.router_z)


class _Experts(nn.Module):
    """The kernels of all experts, stacked: gate and up [experts, embed, width], and down; each with
    the pair beside it."""

    config: MixtureConfig
    embed: int
    dtypes: DTypes
    zero_init: bool

    @nn.compact
    def __call__(self) -> tuple[ExpertKernels, ...]:
        inner = (self.config.experts, self.embed, self.config.width)
        outer = (self.config.experts, self.config.width, self.embed)
        drawn = nn.initializers.lecun_normal(batch_axis=0)
        last = nn.initializers.zeros if self.zero_init else drawn
        kernels = (("gate", inner, drawn), ("up", inner, drawn), ("down", outer, last))
        return tuple(
            _Kernel(shape, init, self.dtypes.params, name=name)() for name, shape, init in kernels
        )


class _Kernel(nn.Module):
    """A parameter `kernel` of its own, of experts."""

    shape: tuple[int, ...]
    initializer: nn.initializers.Initializer
    dtype: str

    @nn.compact
    def __call__(self) -> ExpertKernels:
        kernel = self.param("kernel", self.initializer, self.shape, jnp.dtype(self.dtype))
        pair = pair_beside(self, "kernel")
        if pair is None:
            return ExpertKernels(kernel)
        return ExpertKernels(kernel, pair.scale[:, None, None] * pair.a, pair.b)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); where the configuration says so, what is
    added is normalised too.

    The last matrix of each branch begins at zero (Zhang et al. 2019, Fixup,
    https://arxiv.org/abs/1901.09321), so that a new layer is the identity. Otherwise the branches
    drown the small embeddings: docs/performance.md has the figures. Where a norm comes after it,
    which would make anything near zero large, the norm's scale begins at zero instead.
    """

    config: LayerConfig
    dtypes: DTypes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None, RouterLosses | None]:
        config, dtypes = self.config, self.dtypes
        zero_init = not config.post_norms

        def added(
            name: str, branch: Float[Array, "batch seq embed"]
        ) -> Float[Array, "batch seq embed"]:
            if config.post_norms:
                norm = Norm(config.norm, dtypes, zero_init=True, name=f"{name}_post_norm")
                branch = norm(branch)
            return dropout(branch, config.dropout, context.dropout_keys, name)

        normed = Norm(config.norm, dtypes, name="attention_norm")(x)
        mixed, cache = self._attention(zero_init)(normed, context, cache)
        x = constrain(x + added("attention", mixed), BATCH_AXES)

        normed = Norm(config.norm, dtypes, name="mlp_norm")(x)
        losses = None
        if isinstance(config.mlp, MixtureConfig):
            mixture = Mixture(config.mlp, dtypes, zero_init, name="mlp")
            mixed, losses = mixture(normed, context.segment_ids)
        else:
            mixed = Mlp(config.mlp, dtypes, zero_init, name="mlp")(normed, context.dropout_keys)
        x = constrain(x + added("mlp", mixed), BATCH_AXES)
        record(self, HIDDEN, hidden=x)
        return x, cache, losses

    def _attention(self, zero_init: bool) -> nn.Module:
        config = self.config.attention
        if isinstance(config, LatentAttentionConfig):
            return LatentAttention(config, self.dtypes, zero_init, name="attention")
        return Attention(config, self.dtypes, zero_init, name="attention")
