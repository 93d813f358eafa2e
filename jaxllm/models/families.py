"""Families: how a `ModelConfig` becomes a `TransformerConfig`."""

from collections.abc import Callable

import jax

from jaxllm.errors import UserError
from jaxllm.models.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    StackConfig,
    TransformerConfig,
)
from jaxllm.ops.attention import BACKENDS


def llama(config: ModelConfig, vocab_size: int) -> TransformerConfig:
    """Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971): one stack of equal layers
    with RMSNorm before attention and MLP, rotary positions, gated MLP, grouped key/value heads."""
    layer = LayerConfig(
        attention=AttentionConfig(
            heads=config.heads,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim or config.width // config.heads,
            rope_theta=config.rope_theta,
            backend=config.attention,
        ),
        mlp=MlpConfig(width=config.mlp_width or _round_up(8 * config.width / 3, 32)),
        norm_eps=config.norm_eps,
    )
    return TransformerConfig(
        vocab_size=vocab_size,
        width=config.width,
        stacks=(StackConfig(repeats=config.layers, unit=(layer,)),),
        norm_eps=config.norm_eps,
        tied=config.tied,
        dtype=_compute_dtype(config.dtype),
        remat=config.remat,
    )


FAMILIES: dict[str, Callable[[ModelConfig, int], TransformerConfig]] = {"llama": llama}


def architecture(config: ModelConfig, vocab_size: int) -> TransformerConfig:
    """The decoder that `config` describes, for a vocabulary of `vocab_size`.

    Raises:
        UserError: an unknown family or attention backend; the known ones are listed.
    """
    for name, known in (("family", FAMILIES), ("attention", BACKENDS)):
        value = getattr(config, name)
        if value not in known:
            raise UserError(
                f"config.model.{name}: {value!r} is unknown; the known ones are {', '.join(known)}."
            )
    return FAMILIES[config.family](config, vocab_size)


def _compute_dtype(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _round_up(value: float, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple
