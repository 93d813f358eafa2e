"""The parts that layers are made of: the one `Linear`, norms, activations, dropout."""

import zlib
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxllm.models.config import DTypes, NormConfig
from jaxllm.models.lora import Pair, column_factors, pair_beside
from jaxllm.models.quantised import whole_kernel
from jaxllm.ops.products import PRODUCT, adapted_product, product

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


class Linear(nn.Module):
    """x @ kernel (+ bias): every matrix product of the model with its parameters.

    The kernel is a matrix [in, out], cast to the dtype of the input. A low-rank pair beside it is
    added (`jaxllm.models.lora`), without the kernel's gradient being needed.
    """

    features: int
    dtypes: DTypes
    bias: bool = False
    zero_init: bool = False
    """Begin at zero, rather than at a truncated normal of standard deviation 1/√in."""
    result_dtype: str = ""
    """Empty: that of the input."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "... in"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "... out"]:
        """`dropout_keys`, one a row, are for what a pair drops."""
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        dtype = jnp.dtype(self.dtypes.params)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        kernel = whole_kernel(self, kernel)
        pair = pair_beside(self, "kernel")
        if pair and self._at_once(x, pair, dropout_keys):
            result = adapted_product(x, kernel, pair.a, pair.b, pair.scale, self.dtypes.reduction)
        else:
            result = product(x, kernel, self.result_dtype, self.dtypes.reduction)
            if pair:
                result = self._adapted(result, x, kernel, pair, dropout_keys)
        result = checkpoint_name(result, PRODUCT)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
            # The bias is widened before it is added to every token: its gradient is a sum over
            # them, of what it was broadcast in.
            wide = result.astype(jnp.float32) + bias.astype(jnp.float32)
            result = wide.astype(result.dtype)
        return result

    def _at_once(
        self, x: Float[Array, "... in"], pair: Pair, dropout_keys: Key[Array, " batch"] | None
    ) -> bool:
        """Whether kernel and pair are added up before the product: where activations have the
        precision for it, and nothing lies between the two."""
        dropped = pair.dropout is not None and dropout_keys is not None
        plain = pair.magnitude is None and pair.a.ndim == 2
        return x.dtype == jnp.float32 and plain and not dropped

    def _adapted(
        self,
        result: Float[Array, "... out"],
        x: Float[Array, "... in"],
        kernel: Float[Array, "in out"],
        pair: Pair,
        dropout_keys: Key[Array, " batch"] | None,
    ) -> Float[Array, "... out"]:
        """What the product is with the pair: x @ W + s · (x @ A) @ B, and DoRA's scaling of it."""
        if pair.dropout is not None:
            x = dropout(x, pair.dropout, dropout_keys, "/".join(self.path))
        if pair.a.ndim == 3:  # a pair for each row of the batch
            thin = _by_row(x, pair.a)
            scale = pair.scale.reshape(-1, *(1 for _ in result.shape[1:]))
            return (result + scale * _by_row(thin, pair.b)).astype(result.dtype)
        thin = product(x, pair.a, "", self.dtypes.reduction)
        more = product(thin, pair.b, str(result.dtype), self.dtypes.reduction)
        wide = result.astype(jnp.float32) + pair.scale * more.astype(jnp.float32)
        if pair.magnitude is not None:
            wide = wide * column_factors(kernel, pair)
        return wide.astype(result.dtype)


def _by_row(
    x: Float[Array, "batch ... in"], matrices: Float[Array, "batch in out"]
) -> Float[Array, "batch ... out"]:
    """Each row times a matrix of its own, in the dtype of `x`, summed in float32."""
    wide = jnp.einsum(
        "b...i,bio->b...o", x, matrices.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return wide.astype(x.dtype)


class Norm(nn.Module):
    """`rms`: x / √(mean(x²) + eps) · scale (Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467); `layer`: (x - mean) / √(var + eps) · scale + bias (Ba et
    al. 2016, https://arxiv.org/abs/1607.06450).

    Computed in float32, returned in the dtype of the input.
    """

    config: NormConfig
    dtypes: DTypes
    zero_init: bool = False
    """Begin with a scale of 0, rather than 1."""

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        config, dtype = self.config, jnp.dtype(self.dtypes.params)
        wide = x.astype(jnp.float32)
        begin = nn.initializers.constant((0 if self.zero_init else 1) - config.offset)
        scale = self.param("scale", begin, (x.shape[-1],), dtype).astype(jnp.float32)
        if config.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        result = wide * jax.lax.rsqrt(mean_square + config.eps) * (scale + config.offset)
        if config.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), dtype)
            result = result + bias.astype(jnp.float32)
        return result.astype(x.dtype)


def dropout(
    x: Float[Array, "batch ..."],
    rate: float | Float[Array, ""],
    keys: Key[Array, " batch"] | None,
    name: str,
) -> Float[Array, "batch ..."]:
    """Sets a share `rate` of each row to zero, and divides the rest by 1 - rate.

    Args:
        x: activations.
        rate: in [0, 1).
        keys: one a row, so that what a row loses does not depend on its neighbours; None: in
            evaluation nothing is dropped.
        name: of the place; every place draws its own.
    """
    if keys is None or (isinstance(rate, float) and rate == 0):
        return x

    def one_row(key: Key[Array, ""], row: Float[Array, "..."]) -> Float[Array, "..."]:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        kept = jax.random.bernoulli(own, 1 - rate, row.shape)
        return jnp.where(kept, row / (1 - rate), 0).astype(row.dtype)

    return jax.vmap(one_row)(keys, x)
