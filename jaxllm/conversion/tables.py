"""The families that weights are exchanged with: for each one table, read in both directions.

A missing field of a `config.json` means what it means to Hugging Face Transformers, which the
defaults here are those of.
"""

import dataclasses

from jaxllm.conversion import typed
from jaxllm.conversion.config_rows import (
    Row,
    activation,
    fixed,
    query_scale,
    value,
    window_by_layer,
    window_of_all,
)
from jaxllm.conversion.rope_rows import rope, rope_by_kind
from jaxllm.conversion.typed import Theirs
from jaxllm.conversion.weights import Weight, linear, norm
from jaxllm.models.families import FAMILIES

# From models saved without their head, which leaves out the first word of each name.
_HEADLESS = ((r"(?=(layers\.\d+|embed_tokens|norm)\.)", "model."),)
_BUFFERS = (r".*\.rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Table:
    """How a family is published."""

    model_type: str
    """What `config.json` calls it."""
    architecture: str
    """The class of Hugging Face Transformers that is the whole language model."""
    config: tuple[Row, ...]
    weights: tuple[Weight, ...]
    also: tuple[str, ...] = ()
    """Other values of `model_type`, of models that have this one as a part, in `text_config`."""
    renamed: tuple[tuple[str, str], ...] = _HEADLESS
    """How names begin in some files (a pattern), and how in `weights`."""
    ignored: tuple[str, ...] = _BUFFERS
    """Patterns of tensors that files may have and that say nothing more, by their whole names."""


# What no family here can have.
_NEVER = (
    fixed("quantization_config", None),
    fixed("partial_rotary_factor", None, 1.0),
    fixed("is_causal", None, True),
)
_OUTSIDE = (
    Weight("model.embed_tokens.weight", ("embedding",)),
    *norm("model.norm", "final_norm"),
    Weight("lm_head.weight", ("output",), transposed=True),
)
_ATTENTION = (
    *norm("model.layers.{layer}.input_layernorm", "attention_norm"),
    *linear("model.layers.{layer}.self_attn.q_proj", "attention/query"),
    *linear("model.layers.{layer}.self_attn.k_proj", "attention/key"),
    *linear("model.layers.{layer}.self_attn.v_proj", "attention/value"),
    *linear("model.layers.{layer}.self_attn.o_proj", "attention/output"),
    *norm("model.layers.{layer}.self_attn.q_norm", "attention/query_norm"),
    *norm("model.layers.{layer}.self_attn.k_norm", "attention/key_norm"),
)
_MLP = (
    *linear("model.layers.{layer}.mlp.gate_proj", "mlp/gate"),
    *linear("model.layers.{layer}.mlp.up_proj", "mlp/up"),
    *linear("model.layers.{layer}.mlp.down_proj", "mlp/down"),
)
_LLAMA = (
    *_OUTSIDE,
    *_ATTENTION,
    *norm("model.layers.{layer}.post_attention_layernorm", "mlp_norm"),
    *_MLP,
)
_GEMMA = (
    *_OUTSIDE,
    *_ATTENTION,
    *norm("model.layers.{layer}.post_attention_layernorm", "attention_post_norm"),
    *norm("model.layers.{layer}.pre_feedforward_layernorm", "mlp_norm"),
    *_MLP,
    *norm("model.layers.{layer}.post_feedforward_layernorm", "mlp_post_norm"),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """A layer of Llama's with a mixture in the place of its MLP."""
    expert = f"model.layers.{{layer}}.{block}.experts.{{expert}}"
    return (
        *_OUTSIDE,
        *_ATTENTION,
        *norm("model.layers.{layer}.post_attention_layernorm", "mlp_norm"),
        *linear(f"model.layers.{{layer}}.{block}.gate", "mlp/router"),
        *linear(f"{expert}.{gate}", "mlp/experts/gate"),
        *linear(f"{expert}.{up}", "mlp/experts/up"),
        *linear(f"{expert}.{down}", "mlp/experts/down"),
    )


def _sizes(
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None,
    positions: int,
    eps: float = 1e-6,
    tied: bool = False,
) -> tuple[Row, ...]:
    """The fields of all families but GPT-2, with what each is where it is missing."""
    return (
        *_NEVER,
        value("vocab_size", "vocab_size", vocab),
        value("hidden_size", "width", width),
        value("num_hidden_layers", "layers", layers, most=typed.MOST_PARTS),
        value("num_attention_heads", "heads", heads),
        value("num_key_value_heads", "kv_heads", kv_heads, null=True),
        value("head_dim", "head_dim", head_dim, null=True),
        value("max_position_embeddings", "max_positions", positions),
        value("rms_norm_eps", "norm_eps", eps),
        value("tie_word_embeddings", "tied", tied),
    )


def _qwen(head_dim: int | None) -> tuple[Row, ...]:
    return (
        *_sizes(151936, 4096, 32, 32, 32, head_dim, 32768),
        value("intermediate_size", "mlp_width", 22016),
        activation("hidden_act", "silu"),
        rope(10_000.0, 32768),
        window_by_layer(
            usual=FAMILIES["qwen3"].pattern,
            default=4096,
            unlisted=_late_window,
            layers=32,
            switch="use_sliding_window",
        ),
    )


def _late_window(config: Theirs, layer: int) -> str:
    """Qwen's: layers from `max_window_layers` on have windows, if any have."""
    first = typed.integer(config, "max_window_layers", 28, least=0)
    some = typed.switch(config, "use_sliding_window", False)
    some = some and config.get("sliding_window", 0) is not None
    return "local" if some and layer >= first else "global"


def _every_sixth_global(config: Theirs, layer: int) -> str:
    """Gemma 3's; or another than the sixth, by `sliding_window_pattern`."""
    every = typed.integer(config, "sliding_window_pattern", 6)
    return "local" if (layer + 1) % every else "global"


def _gemma(vocab: int, positions: int) -> tuple[Row, ...]:
    return (
        *_sizes(vocab, 2304, 26, 8, 4, 256, positions, tied=True),
        value("intermediate_size", "mlp_width", 9216),
        activation("hidden_activation", "gelu_pytorch_tanh"),
        fixed("attention_bias", False),
        fixed("use_bidirectional_attention", None, False),
        query_scale(256),
    )


TABLES: dict[str, Table] = {
    "llama": Table(
        "llama",
        "LlamaForCausalLM",
        config=(
            *_sizes(32000, 4096, 32, 32, None, None, 2048),
            value("intermediate_size", "mlp_width", 11008),
            activation("hidden_act", "silu"),
            fixed("attention_bias", False),
            fixed("mlp_bias", False),
            rope(10_000.0, 2048),
        ),
        weights=_LLAMA,
    ),
    "gpt2": Table(
        "gpt2",
        "GPT2LMHeadModel",
        config=(
            *_NEVER,
            value("vocab_size", "vocab_size", 50257),
            value("n_embd", "width", 768, also="hidden_size"),
            value("n_layer", "layers", 12, also="num_hidden_layers", most=typed.MOST_PARTS),
            value("n_head", "heads", 12, also="num_attention_heads"),
            value("n_inner", "mlp_width", None, null=True),
            value("n_positions", "max_positions", 1024, also="max_position_embeddings"),
            value("layer_norm_epsilon", "norm_eps", 1e-5),
            value("tie_word_embeddings", "tied", True),
            value("resid_pdrop", "dropout", 0.1, zero=True),
            value("embd_pdrop", "embedding_dropout", 0.1, zero=True),
            activation("activation_function", "gelu_new"),
            fixed("scale_attn_weights", True),
            fixed("scale_attn_by_inverse_layer_idx", False),
            fixed("add_cross_attention", False),
        ),
        weights=(
            Weight("transformer.wte.weight", ("embedding",)),
            Weight("transformer.wpe.weight", ("position_embedding",)),
            *norm("transformer.ln_f", "final_norm"),
            Weight("lm_head.weight", ("output",), transposed=True),
            *norm("transformer.h.{layer}.ln_1", "attention_norm"),
            *linear(
                "transformer.h.{layer}.attn.c_attn",
                "attention/query",
                "attention/key",
                "attention/value",
                transposed=False,
            ),
            *linear("transformer.h.{layer}.attn.c_proj", "attention/output", transposed=False),
            *norm("transformer.h.{layer}.ln_2", "mlp_norm"),
            *linear("transformer.h.{layer}.mlp.c_fc", "mlp/up", transposed=False),
            *linear("transformer.h.{layer}.mlp.c_proj", "mlp/down", transposed=False),
        ),
        renamed=((r"(?=(h\.\d+|wte|wpe|ln_f)\.)", "transformer."),),
        ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the mask of causality
    ),
    "mistral": Table(
        "mistral",
        "MistralForCausalLM",
        config=(
            *_sizes(32000, 4096, 32, 32, 8, None, 131072),
            value("intermediate_size", "mlp_width", 14336),
            activation("hidden_act", "silu"),
            rope(10_000.0, 131072),
            window_of_all(4096),
        ),
        weights=_LLAMA,
    ),
    "qwen2": Table(
        "qwen2",
        "Qwen2ForCausalLM",
        config=_qwen(head_dim=None),
        weights=_LLAMA,
    ),
    "qwen3": Table(
        "qwen3",
        "Qwen3ForCausalLM",
        config=(*_qwen(head_dim=128), fixed("attention_bias", False)),
        weights=_LLAMA,
    ),
    "gemma2": Table(
        "gemma2",
        "Gemma2ForCausalLM",
        config=(
            *_gemma(256000, 8192),
            value("attn_logit_softcapping", "attention_soft_cap", 50.0, null=True),
            value("final_logit_softcapping", "logit_soft_cap", 30.0, null=True),
            rope(10_000.0, 8192),
            window_by_layer(
                usual=FAMILIES["gemma2"].pattern,
                default=4096,
                unlisted=lambda config, layer: "global" if layer % 2 else "local",
                layers=26,
            ),
        ),
        weights=_GEMMA,
    ),
    "gemma3": Table(
        "gemma3_text",
        "Gemma3ForCausalLM",
        config=(
            *_gemma(262208, 131072),
            value("attn_logit_softcapping", "attention_soft_cap", None, null=True),
            value("final_logit_softcapping", "logit_soft_cap", None, null=True),
            rope_by_kind(1_000_000.0, 10_000.0, 131072),
            window_by_layer(
                usual=FAMILIES["gemma3"].pattern,
                default=4096,
                unlisted=_every_sixth_global,
                layers=26,
            ),
        ),
        weights=_GEMMA,
        also=("gemma3",),
        renamed=(
            (r"(language_model\.model|model\.language_model)\.", "model."),
            (r"language_model\.lm_head\.", "lm_head."),
            *_HEADLESS,
        ),
        ignored=(*_BUFFERS, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    ),
    "mixtral": Table(
        "mixtral",
        "MixtralForCausalLM",
        config=(
            *_sizes(32000, 4096, 32, 32, 8, None, 131072, eps=1e-5),
            value("intermediate_size", "mlp_width", 14336),
            value("num_local_experts", "experts", 8, also="num_experts", most=typed.MOST_PARTS),
            value("num_experts_per_tok", "experts_per_token", 2),
            activation("hidden_act", "silu"),
            rope(1_000_000.0, 131072),
            window_of_all(None),
        ),
        weights=_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    "qwen3_moe": Table(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        config=(
            *_sizes(151936, 2048, 24, 32, 4, None, 32768),
            value("moe_intermediate_size", "mlp_width", 768),
            value("num_experts", "experts", 128, also="num_local_experts", most=typed.MOST_PARTS),
            value("num_experts_per_tok", "experts_per_token", 8),
            value("norm_topk_prob", "normalised_experts", False),
            activation("hidden_act", "silu"),
            fixed("attention_bias", False),
            fixed("decoder_sparse_step", 1),
            fixed("mlp_only_layers", None, []),
            rope(10_000.0, 32768),
            window_of_all(4096, switch="use_sliding_window"),
        ),
        weights=_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
}
"""The table of each family of `jaxllm.models.families.FAMILIES`."""
