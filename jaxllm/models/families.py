"""Families: what distinguishes them, as a table, and how a `ModelConfig` is completed from it."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import jax

from jaxllm.errors import UserError
from jaxllm.models.attention import check_attention
from jaxllm.models.config import (
    AttentionConfig,
    DTypes,
    LatentAttentionConfig,
    LayerConfig,
    MixtureConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    StackConfig,
    TransformerConfig,
)
from jaxllm.models.parts import ACTIVATIONS
from jaxllm.ops.attention import BACKENDS
from jaxllm.ops.rotary import RopeScaling, RotaryConfig

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family brings beside sizes; the defaults are those of Llama."""

    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    """Whether what a branch adds is normalised too."""
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    attention_input_bias: bool = False
    attention_output_bias: bool = False
    head_norm: bool = False
    """Whether each query and key head is normalised."""
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rope_local_theta: float = 0.0
    """0: that of the other layers, with their scaling."""
    pattern: tuple[str, ...] = ("global",)
    window: int = 0
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    scaled_embedding: bool = False
    """Whether embedded tokens are multiplied by √width."""
    experts: int = 0
    experts_per_token: int = 0


_GEMMA = Family(
    norm_eps=1e-6,
    norm_offset=1.0,
    post_norms=True,
    activation="gelu_tanh",
    scaled_embedding=True,
)

FAMILIES: dict[str, Family] = {
    # Touvron et al. 2023, https://arxiv.org/abs/2302.13971; Llama 3 has rope_theta 500,000, and
    # from 3.1 on rope_scaling.kind llama3: https://arxiv.org/abs/2407.21783.
    "llama": Family(),
    # Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
    "gpt2": Family(
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        mlp_bias=True,
        attention_input_bias=True,
        attention_output_bias=True,
        positions="learned",
    ),
    # Jiang et al. 2023, https://arxiv.org/abs/2310.06825.
    "mistral": Family(pattern=("local",), window=4096),
    # Yang et al. 2024, https://arxiv.org/abs/2407.10671.
    "qwen2": Family(norm_eps=1e-6, rope_theta=1_000_000.0, attention_input_bias=True),
    # Yang et al. 2025, https://arxiv.org/abs/2505.09388.
    "qwen3": Family(norm_eps=1e-6, rope_theta=1_000_000.0, head_norm=True),
    # Gemma Team 2024, https://arxiv.org/abs/2408.00118.
    "gemma2": dataclasses.replace(
        _GEMMA,
        pattern=("local", "global"),
        window=4096,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
    ),
    # Gemma Team 2025, https://arxiv.org/abs/2503.19786.
    "gemma3": dataclasses.replace(
        _GEMMA,
        pattern=("local",) * 5 + ("global",),
        window=1024,
        head_norm=True,
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
    ),
    # Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
    "mixtral": Family(rope_theta=1_000_000.0, experts=8, experts_per_token=2),
    # Yang et al. 2025, https://arxiv.org/abs/2505.09388.
    "qwen3_moe": Family(
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        head_norm=True,
        experts=128,
        experts_per_token=8,
    ),
}


def architecture(config: ModelConfig, vocab_size: int) -> TransformerConfig:
    """The Transformer that `config` describes, for a vocabulary of `vocab_size`.

    Raises:
        UserError: an unknown family, activation or attention backend (the known ones are
            listed), options that do not go together, or one that would change nothing.
    """
    if config.family not in FAMILIES:
        raise _unknown("family", config.family, FAMILIES)
    if config.attention not in BACKENDS:
        raise _unknown("attention", config.attention, BACKENDS)
    family = FAMILIES[config.family]
    if (config.activation or family.activation) not in ACTIVATIONS:
        raise _unknown("activation", config.activation, ACTIVATIONS)
    positions = config.positions or family.positions
    pattern = tuple(config.pattern.split(",")) if config.pattern else family.pattern
    _check_used(config, family, positions, pattern)
    layers = {kind: _layer(config, family, positions, local=kind == "local") for kind in pattern}
    return TransformerConfig(
        vocab_size=vocab_size,
        width=config.width,
        stacks=_stacks(tuple(layers[kind] for kind in pattern), config.layers),
        norm=_norm(config, family),
        tied=config.tied,
        embedding_scale=config.width**0.5 if family.scaled_embedding else 1.0,
        learned_positions=config.max_positions if positions == "learned" else 0,
        sinusoidal=positions == "sinusoidal",
        embedding_dropout=config.embedding_dropout,
        logit_soft_cap=_given(config.logit_soft_cap, family.logit_soft_cap),
        dtypes=DTypes(config.param_dtype, _compute_dtype(config.dtype), config.reduction_dtype),
        remat=config.remat,
    )


def _unknown(field: str, value: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"config.model.{field}: {value!r} is unknown; the known ones are {', '.join(known)}."
    )


# Beside `kind`, the fields of `rope_scaling` that each kind reads.
_READ_BY_SCALING = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_length", "low_frequency", "high_frequency"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
}


def _check_used(
    config: ModelConfig, family: Family, positions: str, pattern: tuple[str, ...]
) -> None:
    """Checks that no field is set which the other fields leave without effect.

    Raises:
        UserError: one is; the message says why.
    """
    no_local = "" if "local" in pattern else "no layer of the pattern is local"
    not_rotary = "" if positions == "rotary" else f"positions are {positions}, not rotary"
    no_experts = "" if config.experts or family.experts else "there are no experts (model.experts)"
    unread = {
        "max_positions": "" if positions == "learned" else f"positions are {positions}",
        "rope_theta": not_rotary,
        "rope_scaling": not_rotary,
        "rope_local_theta": not_rotary or no_local,
        "window": no_local,
        "experts_per_token": no_experts,
        "normalised_experts": no_experts,
        "load_balance_loss": no_experts,
        "router_z_loss": no_experts,
    }
    for field, reason in unread.items():
        if reason and getattr(config, field) != getattr(ModelConfig, field):
            raise UserError(f"config.model.{field}: would change nothing, since {reason}.")
    if "local" in config.pattern and not _given(config.window, family.window):
        raise UserError(
            "config.model.pattern: `local` would change nothing, since the window is 0; give "
            "--config.model.window too."
        )
    scaling = config.rope_scaling
    for name in (field.name for field in dataclasses.fields(RopeScaling)):
        changed = getattr(scaling, name) != getattr(RopeScaling, name)
        if changed and name not in ("kind", *_READ_BY_SCALING[scaling.kind]):
            raise UserError(
                f"config.model.rope_scaling.{name}: would change nothing, since the kind of "
                f"scaling is {scaling.kind}."
            )
    if scaling.kind != "none" and scaling.factor == 1 and not scaling.attention_factor:
        raise UserError(
            f"config.model.rope_scaling.factor: is 1, and {scaling.kind} would change nothing; "
            "give the new length over the old."
        )


def _stacks(pattern: tuple[LayerConfig, ...], layers: int) -> tuple[StackConfig, ...]:
    """The pattern as often as it fits whole, and what remains of it."""
    repeats, rest = divmod(layers, len(pattern))
    stacks = [StackConfig(repeats, pattern)] if repeats else []
    if rest:
        stacks.append(StackConfig(1, pattern[:rest]))
    return tuple(stacks)


def _layer(config: ModelConfig, family: Family, positions: str, local: bool) -> LayerConfig:
    return LayerConfig(
        attention=_attention(config, family, positions, local),
        mlp=_mlp(config, family),
        norm=_norm(config, family),
        post_norms=family.post_norms,
        dropout=config.dropout,
    )


def _attention(
    config: ModelConfig, family: Family, positions: str, local: bool
) -> AttentionConfig | LatentAttentionConfig:
    attention: AttentionConfig | LatentAttentionConfig
    if config.latent_width:
        attention = _latent_attention(config, family, positions, local)
    else:
        attention = _grouped_attention(config, family, positions, local)
    check_attention(attention, _compute_dtype(config.dtype), prefix=False)
    return attention


def _grouped_attention(
    config: ModelConfig, family: Family, positions: str, local: bool
) -> AttentionConfig:
    head_dim = config.head_dim or config.width // config.heads
    rotary = None
    if positions == "rotary":
        if head_dim % 2:
            raise UserError(
                f"config.model.head_dim: must be even, since rotary positions turn pairs, and is "
                f"{head_dim}."
            )
        rotary = _rotary(config, family, head_dim, local)
    return AttentionConfig(
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_dim=head_dim,
        rotary=rotary,
        causal=config.causal,
        window=_given(config.window, family.window) if local else 0,
        scale=config.attention_scale or head_dim**-0.5,
        soft_cap=_given(config.attention_soft_cap, family.attention_soft_cap),
        input_bias=family.attention_input_bias,
        output_bias=family.attention_output_bias,
        head_norm=_norm(config, family) if family.head_norm else None,
        backend=config.attention,
    )


def _latent_attention(
    config: ModelConfig, family: Family, positions: str, local: bool
) -> LatentAttentionConfig:
    if family.attention_input_bias or family.head_norm:
        extra = "norms of query and key heads" if family.head_norm else "biases"
        raise UserError(
            f"config.model.latent_width: the attention of {config.family!r} has {extra}, and "
            "latent attention has none; choose another family."
        )
    if positions != "rotary":
        raise UserError(
            "config.model.latent_width: latent attention has rotary positions, and "
            f"config.model.positions is {positions!r}; give --config.model.positions=rotary."
        )
    head_dim = config.head_dim or config.width // config.heads
    return LatentAttentionConfig(
        heads=config.heads,
        latent_width=config.latent_width,
        query_latent_width=config.query_latent_width,
        plain_head_dim=head_dim,
        value_dim=config.value_head_dim or head_dim,
        rotary=_rotary(config, family, config.rope_head_dim, local),
        causal=config.causal,
        window=_given(config.window, family.window) if local else 0,
        scale=config.attention_scale or (head_dim + config.rope_head_dim) ** -0.5,
        soft_cap=_given(config.attention_soft_cap, family.attention_soft_cap),
        norm=_norm(config, family),
        backend=config.attention,
    )


def _rotary(config: ModelConfig, family: Family, head_dim: int, local: bool) -> RotaryConfig:
    local_theta = config.rope_local_theta or family.rope_local_theta
    if local and local_theta:
        return RotaryConfig(head_dim, local_theta, RopeScaling())
    return RotaryConfig(head_dim, config.rope_theta or family.rope_theta, config.rope_scaling)


def _mlp(config: ModelConfig, family: Family) -> MlpConfig | MixtureConfig:
    usual = _round_up(8 * config.width / 3, 32) if family.gated else 4 * config.width
    width = config.mlp_width or usual
    activation = config.activation or family.activation
    experts = config.experts or family.experts
    if not experts:
        return MlpConfig(width, activation, family.gated, family.mlp_bias)
    per_token = config.experts_per_token or family.experts_per_token or min(2, experts)
    if per_token > experts:
        raise UserError(
            f"config.model.experts_per_token: {per_token} is more than the {experts} experts."
        )
    if not family.gated or family.mlp_bias:
        raise UserError(
            f"config.model.experts: the MLP of {config.family!r} is not gated, and experts are; "
            "choose another family."
        )
    return MixtureConfig(
        experts=experts,
        per_token=per_token,
        width=width,
        activation=activation,
        normalise=config.normalised_experts,
        load_balance_loss=config.load_balance_loss,
        router_z_loss=config.router_z_loss,
    )


def _norm(config: ModelConfig, family: Family) -> NormConfig:
    return NormConfig(family.norm, config.norm_eps or family.norm_eps, family.norm_offset)


def _given(value: Number, otherwise: Number) -> Number:
    """A field's value, or, where it is -1, the family's."""
    return otherwise if value == -1 else value


def _compute_dtype(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _round_up(value: float, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple
