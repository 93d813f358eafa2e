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
from jaxllm.models.stacks import cut
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
    """The Transformer that `config` describes, for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: an unknown family, activation or attention backend (the known ones are
            listed), options that do not go together, one that would change nothing, or fewer
            rows of the embedding than tokens.
    """
    whole = completed(config)
    family = FAMILIES[config.family]
    if whole.attention not in BACKENDS:
        raise _unknown("attention", whole.attention, BACKENDS)
    if whole.activation not in ACTIVATIONS:
        raise _unknown("activation", whole.activation, ACTIVATIONS)
    _check_used(config, whole)
    if 0 < whole.vocab_size < vocab_size:
        raise UserError(
            f"config.model.vocab_size: {whole.vocab_size:,} rows of the embedding are fewer than "
            f"the {vocab_size:,} tokens of the tokenizer; give the tokenizer of this model."
        )
    pattern = whole.pattern.split(",")
    layers = {kind: _layer(whole, family, local=kind == "local") for kind in pattern}
    return TransformerConfig(
        vocab_size=whole.vocab_size or vocab_size,
        width=whole.width,
        stacks=_stacks(tuple(layers[kind] for kind in pattern), whole.layers, whole.top_layers),
        norm=_norm(whole, family),
        tied=whole.tied,
        embedding_scale=whole.width**0.5 if family.scaled_embedding else 1.0,
        max_positions=whole.max_positions,
        learned_positions=whole.max_positions if whole.positions == "learned" else 0,
        sinusoidal=whole.positions == "sinusoidal",
        embedding_dropout=whole.embedding_dropout,
        logit_soft_cap=whole.logit_soft_cap,
        dtypes=DTypes(whole.param_dtype, _compute_dtype(whole.dtype), whole.reduction_dtype),
        remat=whole.remat,
        head=whole.head,
    )


def completed(config: ModelConfig) -> ModelConfig:
    """`config` with its family's values in the place of "the family's", and every size that
    follows from another one told.

    What needs no value keeps its default: a window where no layer is local, the size of the
    vocabulary.

    Raises:
        UserError: the family is unknown.
    """
    if config.family not in FAMILIES:
        raise _unknown("family", config.family, FAMILIES)
    family = FAMILIES[config.family]
    head_dim = config.head_dim or config.width // config.heads
    usual = _round_up(8 * config.width / 3, 32) if family.gated else 4 * config.width
    positions = config.positions or family.positions
    pattern = config.pattern or ",".join(family.pattern)
    experts = config.experts or family.experts
    per_token = config.experts_per_token or family.experts_per_token or min(2, experts)
    return dataclasses.replace(
        config,
        kv_heads=0 if config.latent_width else config.kv_heads or config.heads,
        head_dim=head_dim,
        value_head_dim=config.value_head_dim or (head_dim if config.latent_width else 0),
        mlp_width=config.mlp_width or usual,
        activation=config.activation or family.activation,
        positions=positions,
        max_positions=config.max_positions or (1024 if positions == "learned" else 0),
        rope_theta=config.rope_theta or family.rope_theta,
        rope_local_theta=config.rope_local_theta or family.rope_local_theta,
        pattern=pattern,
        window=_given(config.window, family.window) if "local" in pattern else 0,
        attention_scale=config.attention_scale or (head_dim + config.rope_head_dim) ** -0.5,
        attention_soft_cap=_given(config.attention_soft_cap, family.attention_soft_cap),
        logit_soft_cap=_given(config.logit_soft_cap, family.logit_soft_cap),
        experts=experts,
        experts_per_token=per_token if experts else 0,
        norm_eps=config.norm_eps or family.norm_eps,
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


def _check_used(config: ModelConfig, whole: ModelConfig) -> None:
    """Checks that no field of `config` is set which the other fields leave without effect.

    Raises:
        UserError: one is; the message says why.
    """
    no_local = "" if "local" in whole.pattern else "no layer of the pattern is local"
    rotary = whole.positions == "rotary"
    not_rotary = "" if rotary else f"positions are {whole.positions}, not rotary"
    no_experts = "" if whole.experts else "there are no experts (model.experts)"
    unread = {
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
    if "local" in config.pattern and not whole.window:
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


def _stacks(pattern: tuple[LayerConfig, ...], layers: int, top: int) -> tuple[StackConfig, ...]:
    """The pattern as often as it fits whole, and what remains of it; the last `top` layers apart.

    Raises:
        UserError: there are not so many.
    """
    if top > layers:
        raise UserError(
            f"config.model.top_layers: the model has {layers} layers, and the last {top} are asked "
            "for (by config.train.trainable=last:N, it may be)."
        )
    repeats, rest = divmod(layers, len(pattern))
    stacks = [StackConfig(repeats, pattern)] if repeats else []
    if rest:
        stacks.append(StackConfig(1, pattern[:rest]))
    return cut(tuple(stacks), layers - top) if top else tuple(stacks)


def _layer(config: ModelConfig, family: Family, local: bool) -> LayerConfig:
    return LayerConfig(
        attention=_attention(config, family, local),
        mlp=_mlp(config, family),
        norm=_norm(config, family),
        post_norms=family.post_norms,
        dropout=config.dropout,
    )


def _attention(
    config: ModelConfig, family: Family, local: bool
) -> AttentionConfig | LatentAttentionConfig:
    attention: AttentionConfig | LatentAttentionConfig
    if config.latent_width:
        attention = _latent_attention(config, family, local)
    else:
        attention = _grouped_attention(config, family, local)
    check_attention(attention, _compute_dtype(config.dtype), prefix=False)
    return attention


def _grouped_attention(config: ModelConfig, family: Family, local: bool) -> AttentionConfig:
    rotary = None
    if config.positions == "rotary":
        if config.head_dim % 2:
            raise UserError(
                f"config.model.head_dim: must be even, since rotary positions turn pairs, and is "
                f"{config.head_dim}."
            )
        rotary = _rotary(config, config.head_dim, local)
    return AttentionConfig(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rotary=rotary,
        causal=config.causal,
        window=config.window if local else 0,
        scale=config.attention_scale,
        soft_cap=config.attention_soft_cap,
        input_bias=family.attention_input_bias,
        output_bias=family.attention_output_bias,
        head_norm=_norm(config, family) if family.head_norm else None,
        backend=config.attention,
    )


def _latent_attention(config: ModelConfig, family: Family, local: bool) -> LatentAttentionConfig:
    if family.attention_input_bias or family.head_norm:
        extra = "norms of query and key heads" if family.head_norm else "biases"
        raise UserError(
            f"config.model.latent_width: the attention of {config.family!r} has {extra}, and "
            "latent attention has none; choose another family."
        )
    if config.positions != "rotary":
        raise UserError(
            "config.model.latent_width: latent attention has rotary positions, and "
            f"config.model.positions is {config.positions!r}; give --config.model.positions=rotary."
        )
    return LatentAttentionConfig(
        heads=config.heads,
        latent_width=config.latent_width,
        query_latent_width=config.query_latent_width,
        plain_head_dim=config.head_dim,
        value_dim=config.value_head_dim,
        rotary=_rotary(config, config.rope_head_dim, local),
        causal=config.causal,
        window=config.window if local else 0,
        scale=config.attention_scale,
        soft_cap=config.attention_soft_cap,
        norm=_norm(config, family),
        backend=config.attention,
    )


def _rotary(config: ModelConfig, head_dim: int, local: bool) -> RotaryConfig:
    if local and config.rope_local_theta:
        return RotaryConfig(head_dim, config.rope_local_theta, RopeScaling())
    return RotaryConfig(head_dim, config.rope_theta, config.rope_scaling)


def _mlp(config: ModelConfig, family: Family) -> MlpConfig | MixtureConfig:
    if not config.experts:
        return MlpConfig(config.mlp_width, config.activation, family.gated, family.mlp_bias)
    if config.experts_per_token > config.experts:
        raise UserError(
            f"config.model.experts_per_token: {config.experts_per_token} is more than the "
            f"{config.experts} experts."
        )
    if not family.gated or family.mlp_bias:
        raise UserError(
            f"config.model.experts: the MLP of {config.family!r} is not gated, and experts are; "
            "choose another family."
        )
    return MixtureConfig(
        experts=config.experts,
        per_token=config.experts_per_token,
        width=config.mlp_width,
        activation=config.activation,
        normalise=config.normalised_experts,
        load_balance_loss=config.load_balance_loss,
        router_z_loss=config.router_z_loss,
    )


def _norm(config: ModelConfig, family: Family) -> NormConfig:
    return NormConfig(family.norm, config.norm_eps, family.norm_offset)


def _given(value: Number, otherwise: Number) -> Number:
    """A field's value, or, where it is -1, the family's."""
    return otherwise if value == -1 else value


def _compute_dtype(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _round_up(value: float, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple
