"""The model's configuration: what a user writes, and the architecture that it becomes.

`ModelConfig` holds the fields of a config file. A family (`jaxllm.models.families`) turns it
into a `TransformerConfig`: a list of stacks, each a unit of layers repeated. The modules read
only the latter, so no family is ever named inside them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder to build; the vocabulary's size comes from the tokenizer."""

    family: str = "llama"
    """Architecture: `llama`."""
    layers: int = 4
    """Transformer layers."""
    width: int = 256
    """Width of the hidden states (the residual stream)."""
    heads: int = 4
    """Query heads of attention."""
    kv_heads: int = 0
    """Key and value heads, each shared by a group of query heads; 0: as many as `heads`."""
    head_dim: int = 0
    """Width of a head; 0: `width / heads`."""
    mlp_width: int = 0
    """Inner width of the MLP; 0: 8/3 of `width`, rounded up to a multiple of 32."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square under the root of RMSNorm."""
    tied: bool = True
    """Whether the output matrix is the transposed embedding."""
    dtype: str = "auto"
    """Compute dtype: `float32`, `bfloat16`, or `auto` (float32 on CPU, else bfloat16)."""
    remat: str = "none"
    """What the backward pass computes again to save memory: `none` (nothing), `dots` (all but
    the results of matrix products), `full` (each layer whole)."""
    attention: str = "xla"
    """Attention backend: `xla`."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, and was given {getattr(self, name)}")
        for name in ("kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative; 0 chooses by the others")
        for name in ("rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        if (self.head_dim or self.width // self.heads) % 2:
            raise ValueError("head_dim: must be even, since rotary positions turn pairs")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: must be one of {', '.join(known)}, "
                    f"and was given {getattr(self, name)!r}"
                )


_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    backend: str


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Gated MLP of one layer: down(silu(gate(x)) · up(x))."""

    width: int


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer: attention, then MLP, each on the normalised residual stream and added to it."""

    attention: AttentionConfig
    mlp: MlpConfig
    norm_eps: float


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A unit of layers, repeated: its parameters are stacked along a leading axis and scanned."""

    repeats: int
    unit: tuple[LayerConfig, ...]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder, whole."""

    vocab_size: int
    width: int
    stacks: tuple[StackConfig, ...]
    norm_eps: float
    tied: bool
    dtype: str
    """Compute dtype, `float32` or `bfloat16`; parameters are float32."""
    remat: str

    @property
    def layers(self) -> int:
        """The number of layers over all stacks."""
        return sum(stack.repeats * len(stack.unit) for stack in self.stacks)
