"""The model's configuration: what a user writes, and the architecture that it becomes.

`ModelConfig` holds the fields of a config file. `jaxllm.models.families` fills in what a family
brings, and makes a `TransformerConfig` of it: a list of stacks, each a unit of layers repeated.
The modules read only the latter, so no family is ever named inside them.
"""

import dataclasses

from jaxllm.ops.rotary import RopeScaling, RotaryConfig

POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What is read off a whole text, beside the next token: classes, or a number."""

    outputs: int = 0
    """Numbers that the head gives for a text; 0: there is no head. A stage that trains one sets
    it."""
    pooling: str = "last"
    """The hidden state that it reads: of the text's `last` token, or the `mean` of all."""

    def __post_init__(self) -> None:
        if self.outputs < 0:
            raise ValueError("outputs: must not be negative")
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling: must be one of {', '.join(POOLINGS)}, and was given {self.pooling!r}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer to build.

    A field that says "the family's" has another default in each family: docs/models.md.
    """

    family: str = "llama"
    """Architecture: `llama`, `gpt2`, `mistral`, `qwen2`, `qwen3`, `gemma2`, `gemma3`, `mixtral`,
    `qwen3_moe`."""
    vocab_size: int = 0
    """Rows of the embedding, at least as many as the tokenizer has tokens; 0: as many."""
    layers: int = 4
    """Transformer layers."""
    width: int = 256
    """Width of the hidden states (the residual stream)."""
    heads: int = 4
    """Query heads of attention."""
    kv_heads: int = 0
    """Key and value heads, each shared by a group of query heads; 0: as many as `heads`."""
    head_dim: int = 0
    """Width of a head; 0: `width / heads`. With `latent_width`, of its part that is not rotated."""
    latent_width: int = 0
    """Width that a token's keys and values are compressed to, for multi-head latent attention;
    0: they are not, for grouped-query attention."""
    query_latent_width: int = 0
    """With `latent_width`, the same of queries; 0: they are not compressed."""
    rope_head_dim: int = 0
    """With `latent_width`, width of a head's rotated part, whose key all heads share."""
    value_head_dim: int = 0
    """With `latent_width`, width of a head's values; 0: `head_dim`."""
    mlp_width: int = 0
    """Inner width of the MLP (of each expert, where there are experts); 0: 8/3 of `width` for a
    gated MLP, rounded up to a multiple of 32, else 4 times `width`."""
    activation: str = ""
    """Of the MLP: `silu`, `gelu`, `gelu_tanh` (GELU approximated); empty: the family's."""
    positions: str = ""
    """How positions are told: `rotary`, `learned`, `sinusoidal` (as large as the embedded tokens
    at the start), `none`; empty: the family's."""
    max_positions: int = 0
    """Positions that the model is made for, whatever their kind; longer rows are refused. 0: 1,024
    where they are learned, else no limit."""
    rope_theta: float = 0.0
    """Base of the rotary position frequencies; 0: the family's."""
    rope_local_theta: float = 0.0
    """The same, in layers with a window; there positions are never scaled. 0: the family's."""
    rope_scaling: RopeScaling = RopeScaling()
    pattern: str = ""
    """The layers that repeat, in order, as `local,global`: `local` ones see a window only.
    Empty: the family's."""
    window: int = -1
    """Tokens that a `local` layer sees, its own included; 0: all; -1: the family's."""
    causal: bool = True
    """Whether a token sees nothing later than itself. False is for objectives that fill in."""
    attention_scale: float = 0.0
    """Attention scores are multiplied by it; 0: 1/√`head_dim`, the rotated part counted in."""
    attention_soft_cap: float = -1.0
    """Attention scores s become c·tanh(s/c) for this c; 0: never; -1: the family's."""
    logit_soft_cap: float = -1.0
    """The same of the logits over the vocabulary."""
    experts: int = 0
    """Experts of a mixture; 0: the family's."""
    experts_per_token: int = 0
    """Experts that a token goes through; 0: the family's."""
    normalised_experts: bool = True
    """Whether the weights of a token's experts sum to 1, rather than being their probabilities
    among all experts."""
    load_balance_loss: float = 0.01
    """Coefficient of the loss that keeps experts equally used; of mixtures alone."""
    router_z_loss: float = 0.001
    """Coefficient of the loss that keeps a router's logits small; of mixtures alone."""
    dropout: float = 0.0
    """Share of each branch's result set to zero in training."""
    embedding_dropout: float = 0.0
    """Share of the embedded tokens' features set to zero in training."""
    norm_eps: float = 0.0
    """Added under the root of every norm; 0: the family's."""
    tied: bool = True
    """Whether the output matrix is the transposed embedding."""
    dtype: str = "auto"
    """Dtype of activations and of matrix products: `float32`, `bfloat16`, or `auto` (float32 on
    CPU, else bfloat16). Softmax, norms and losses are float32 in any case."""
    param_dtype: str = "float32"
    """Dtype that parameters are kept in: `float32` or `bfloat16`."""
    reduction_dtype: str = "float32"
    """Dtype in which gradients of matrices are summed over tokens and devices: `float32`, or
    `bfloat16` for half the traffic. Those of tables and biases are summed in float32."""
    remat: str = "dots"
    """What the backward pass computes again to save memory: `none` (nothing), `dots` (all but the
    results of matrix products and of attention: half the memory, in no more time on a CPU), `full`
    (each layer whole: a third more products)."""
    head: HeadConfig = HeadConfig()
    top_layers: int = 0
    """The last layers that are a stack of their own, so that they can be trained alone; 0: none.
    `train.trainable=last:N` sets it; it changes nothing that is computed."""
    attention: str = "auto"
    """Attention backend: `auto` (the fastest that can), `xla`, `chunked`, `cudnn`, `pallas`,
    `splash`: docs/attention.md."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, and was given {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")
        for name in ("window", "attention_soft_cap", "logit_soft_cap"):
            if getattr(self, name) < 0 and getattr(self, name) != -1:
                raise ValueError(f"{name}: must not be negative, but for -1: the family's")
        for name in ("dropout", "embedding_dropout"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: must be less than 1")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        self._check_latent()
        if self.pattern and not set(self.pattern.split(",")) <= {"local", "global"}:
            raise ValueError(
                f"pattern: is a list of `local` and `global`, and was given {self.pattern!r}"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: must be one of {', '.join(filter(None, known))}, "
                    f"and was given {getattr(self, name)!r}"
                )

    def _check_latent(self) -> None:
        if not self.latent_width:
            for name in ("query_latent_width", "rope_head_dim", "value_head_dim"):
                if getattr(self, name):
                    raise ValueError(f"{name}: belongs to latent_width, which is 0; set both")
        elif self.kv_heads:
            raise ValueError(
                "kv_heads: with latent_width every head has keys and values of its own; leave it 0"
            )
        elif not self.rope_head_dim or self.rope_head_dim % 2:
            raise ValueError(
                "rope_head_dim: with latent_width must be positive, and even, since rotary "
                f"positions turn pairs; it is {self.rope_head_dim}"
            )


def bare(config: ModelConfig) -> ModelConfig:
    """The same model without a head, and with its layers in as few stacks as they go: what is the
    same however it was trained, and what others know."""
    return dataclasses.replace(config, head=HeadConfig(), top_layers=0)


_NOT_NEGATIVE = (
    "vocab_size",
    "max_positions",
    "kv_heads",
    "head_dim",
    "latent_width",
    "query_latent_width",
    "rope_head_dim",
    "value_head_dim",
    "mlp_width",
    "rope_theta",
    "rope_local_theta",
    "attention_scale",
    "experts",
    "experts_per_token",
    "load_balance_loss",
    "router_z_loss",
    "dropout",
    "embedding_dropout",
    "norm_eps",
    "top_layers",
)
_CHOICES = {
    "positions": ("", "rotary", "learned", "sinusoidal", "none"),
    "dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "reduction_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class DTypes:
    """Names of the dtypes that numbers are kept, multiplied and summed in."""

    params: str
    compute: str
    reduction: str


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """A normalisation over the last axis."""

    kind: str
    """`rms` or `layer`."""
    eps: float
    offset: float = 0.0
    """Added to the scale, which begins at 1 - offset."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None
    """How queries and keys are rotated; None: not at all."""
    causal: bool
    window: int
    """Tokens that are seen, the query's own included; 0: all."""
    scale: float
    soft_cap: float
    """0: none."""
    input_bias: bool
    """Whether the projections to queries, keys and values have a bias."""
    output_bias: bool
    head_norm: NormConfig | None
    """Of each query and key head, before it is rotated."""
    backend: str

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention of one layer."""

    heads: int
    latent_width: int
    """Width of the compressed keys and values."""
    query_latent_width: int
    """Width of the compressed queries; 0: they are not."""
    plain_head_dim: int
    """Width of the part of a query or key head that is not rotated."""
    value_dim: int
    """Width of a head's values."""
    rotary: RotaryConfig
    """How the rest of a query or key head is rotated."""
    causal: bool
    window: int
    """Tokens that are seen, the query's own included; 0: all."""
    scale: float
    soft_cap: float
    """0: none."""
    norm: NormConfig
    """Of what is compressed."""
    backend: str

    @property
    def rope_head_dim(self) -> int:
        """Width of the rotated part of a query or key head."""
        return self.rotary.head_dim

    @property
    def head_dim(self) -> int:
        """Width of a query or key head, both parts of it."""
        return self.plain_head_dim + self.rope_head_dim


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """MLP of one layer: down(act(gate(x)) · up(x)), or, not gated, down(act(up(x)))."""

    width: int
    activation: str
    gated: bool
    bias: bool


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Experts, each a gated MLP, of which a router chooses some for each token."""

    experts: int
    per_token: int
    width: int
    activation: str
    normalise: bool
    """Whether the weights of a token's experts sum to 1."""
    load_balance_loss: float
    router_z_loss: float


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer: attention, then MLP, each on the normalised residual stream and added to it."""

    attention: AttentionConfig | LatentAttentionConfig
    mlp: MlpConfig | MixtureConfig
    norm: NormConfig
    post_norms: bool
    """Whether what a branch adds is normalised too."""
    dropout: float


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A unit of layers, repeated: its parameters are stacked along a leading axis and scanned."""

    repeats: int
    unit: tuple[LayerConfig, ...]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Transformer, whole."""

    vocab_size: int
    """Rows of the embedding; the tokenizer may have fewer tokens."""
    width: int
    stacks: tuple[StackConfig, ...]
    norm: NormConfig
    tied: bool
    embedding_scale: float
    """Embedded tokens are multiplied by it."""
    max_positions: int
    """Positions that it is made for; 0: there is no limit."""
    learned_positions: int
    """Length of the table of learned positions; 0: there is none."""
    sinusoidal: bool
    embedding_dropout: float
    logit_soft_cap: float
    dtypes: DTypes
    remat: str
    head: HeadConfig = HeadConfig()

    @property
    def unrolled(self) -> tuple[LayerConfig, ...]:
        """All layers, in order."""
        return tuple(layer for stack in self.stacks for layer in stack.unit * stack.repeats)

    @property
    def layers(self) -> int:
        """The number of layers over all stacks."""
        return len(self.unrolled)

    @property
    def causal(self) -> bool:
        """Whether no layer sees anything later."""
        return all(layer.attention.causal for layer in self.unrolled)
