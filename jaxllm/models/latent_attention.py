"""Multi-head latent attention: keys and values compressed to one narrow vector a token."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxllm.models.attention import Context, attend, attend_from
from jaxllm.models.config import DTypes, LatentAttentionConfig
from jaxllm.models.intermediates import ATTENTION, record
from jaxllm.models.kv_cache import LatentCache, written
from jaxllm.models.lora import adapted, pair_beside
from jaxllm.models.parts import Linear, Norm
from jaxllm.models.quantised import whole_kernel
from jaxllm.ops.rotary import Rotation, rotate
from jaxllm.sharding.mesh import BATCH_AXES, constrain


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1,
    https://arxiv.org/abs/2405.04434).

    A token's keys and values of all heads are matrices times its `latent_width` numbers. A
    rotation would stand between those matrices and the queries, so positions have features of
    their own: `rope_head_dim` more of each query head, and as many of one key that heads share.
    """

    config: LatentAttentionConfig
    dtypes: DTypes
    zero_init: bool = True
    """Whether the last matrix begins at zero."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        cache: LatentCache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], LatentCache | None]:
        """Attends within `x`, or, with a cache, writes into it and attends to what it holds.

        Both compute the same. Within `x`, keys and values are made from the latents. With a
        cache that would be done for every position at every step, so there the matrices are
        applied on the other side, once for each query: q · (W c) is (Wᵀ q) · c, and the sum of
        weights times W c is W times that of weights times c.
        """
        config = self.config
        rotation = context.rotations[config.rotary]
        plain, rotated = self._queries(x, rotation, context.dropout_keys)
        latent, shared_key = self._latents(x, rotation, context.dropout_keys)
        key_up = Linear(config.heads * config.plain_head_dim, self.dtypes, name="key")
        value_up = Linear(config.heads * config.value_dim, self.dtypes, name="value")
        if cache is None:
            keys = context.dropout_keys
            key, value = (self._by_head(up(latent, keys)) for up in (key_up, value_up))
            shared_key = jnp.broadcast_to(shared_key, (*key.shape[:3], config.rope_head_dim))
            query, key = _joined(plain, rotated), _joined(key, shared_key)
            record(self, ATTENTION, queries=query, keys=key)
            mixed = attend(config, query, key, value, context)
        else:
            new = _joined(latent[:, :, None], shared_key)
            places = (context.positions, context.segment_ids)
            cache = LatentCache(written(cache.latent, new, *places))
            query = _joined(_product("bshd,lhd->bshl", plain, self._matrices(key_up)), rotated)
            # The one head's keys are its values too: the sums over rotated keys cost less than
            # a copy of the cache without them.
            mixed = attend_from(config, query, cache.latent, cache.latent, context)
            mixed = mixed[..., : config.latent_width]
            mixed = _product("bshl,lhd->bshd", mixed, self._matrices(value_up))
        mixed = mixed.reshape(*x.shape[:2], config.heads * config.value_dim)
        output = Linear(x.shape[-1], self.dtypes, zero_init=self.zero_init, name="output")
        return output(mixed, context.dropout_keys), cache

    def _queries(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        dropout_keys: Key[Array, " batch"] | None,
    ) -> tuple[
        Float[Array, "batch seq heads plain_head_dim"],
        Float[Array, "batch seq heads rope_head_dim"],
    ]:
        """The part of each query that knows no position, and the part that does."""
        config = self.config
        if config.query_latent_width:
            down = Linear(config.query_latent_width, self.dtypes, name="query_down")
            x = down(x, dropout_keys)
            x = Norm(config.norm, self.dtypes, name="query_norm")(x)
        query = Linear(config.heads * config.head_dim, self.dtypes, name="query")(x, dropout_keys)
        plain, rotated = jnp.split(self._by_head(query), [config.plain_head_dim], axis=-1)
        return plain, rotate(rotated, rotation)

    def _latents(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        dropout_keys: Key[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch seq latent_width"], Float[Array, "batch seq 1 rope_head_dim"]]:
        """The latent of keys and values, and the rotated key that the heads share."""
        config = self.config
        width = config.latent_width + config.rope_head_dim
        both = Linear(width, self.dtypes, name="latent_down")(x, dropout_keys)
        latent, shared_key = jnp.split(both, [config.latent_width], axis=-1)
        latent = Norm(config.norm, self.dtypes, name="latent_norm")(latent)
        return latent, rotate(shared_key[:, :, None], rotation)

    def _by_head(
        self, x: Float[Array, "batch seq features"]
    ) -> Float[Array, "batch seq heads head_dim"]:
        x = x.reshape(*x.shape[:2], self.config.heads, -1)
        return constrain(x, BATCH_AXES, None, "tensor")

    def _matrices(self, up: Linear) -> Float[Array, "latent_width heads head_dim"]:
        """The matrix of each head in an up-projection, which is not applied to latents here."""
        kernel: Array = whole_kernel(up, up.get_variable("params", "kernel"))
        if pair := pair_beside(up, "kernel"):
            kernel = adapted(kernel, pair)
        return kernel.reshape(self.config.latent_width, self.config.heads, -1)


def _joined(
    first: Float[Array, "... first"], second: Float[Array, "... second"]
) -> Float[Array, "... both"]:
    return jnp.concatenate([first, second], axis=-1)


def _product(
    subscripts: str, x: Float[Array, "..."], matrices: Float[Array, "..."]
) -> Float[Array, "..."]:
    """An einsum in the dtype of `x`, summed in float32."""
    matrices = matrices.astype(x.dtype)
    return jnp.einsum(subscripts, x, matrices, preferred_element_type=jnp.float32).astype(x.dtype)
