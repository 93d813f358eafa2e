"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its scalings."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

Rotation = tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]
"""Sines and cosines of the angle of each pair at each position, float32."""


@dataclasses.dataclass(frozen=True, order=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than a model was trained on."""

    kind: str = "none"
    """`none`; `linear` (Chen et al. 2023, https://arxiv.org/abs/2306.15595): all positions are
    divided by `factor`; `llama3` (Dubey et al. 2024, https://arxiv.org/abs/2407.21783): only slow
    frequencies are; `yarn` (Peng et al. 2023, https://arxiv.org/abs/2309.00071)."""
    factor: float = 1.0
    """The new length over the old."""
    original_length: int = 8192
    """Sequence length of the training before; of `llama3` and `yarn`."""
    low_frequency: float = 1.0
    """`llama3`: slower frequencies, of fewer turns over the original length, are divided whole."""
    high_frequency: float = 4.0
    """`llama3`: faster frequencies, of more turns over the original length, are left alone."""
    beta_fast: float = 32.0
    """`yarn`: frequencies of more turns over the original length are left alone."""
    beta_slow: float = 1.0
    """`yarn`: frequencies of fewer turns are divided whole."""
    attention_factor: float = 0.0
    """`yarn`: queries and keys are multiplied by it; 0: 0.1·ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "llama3", "yarn"):
            raise ValueError(
                f"kind: must be one of none, linear, llama3, yarn, and was given {self.kind!r}"
            )
        if self.factor < 1:
            raise ValueError("factor: must be at least 1")
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(f"{low}: must be positive, and less than {high}")
        if self.original_length < 1:
            raise ValueError("original_length: must be positive")
        if self.attention_factor < 0:
            raise ValueError("attention_factor: must not be negative; 0 chooses by factor")


@dataclasses.dataclass(frozen=True, order=True)
class RotaryConfig:
    """Which angle a pair of features turns by, from one position to the next."""

    head_dim: int
    theta: float = 10_000.0
    scaling: RopeScaling = RopeScaling()


def frequencies(config: RotaryConfig) -> Float64[np.ndarray, " half"]:
    """Radians a position of each pair: theta^(-2i/head_dim), scaled as the configuration says."""
    half = config.head_dim // 2
    plain = config.theta ** (-np.arange(half) / half)
    scaling = config.scaling
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original_length * plain / (2 * math.pi)
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency, scaling.high_frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:
        # YaRN's ramp runs over the index of the pair, between those that make so many turns.
        def index(turns: float) -> float:
            length = scaling.original_length / (2 * math.pi * turns)
            return half * math.log(length) / math.log(config.theta)

        first = max(math.floor(index(scaling.beta_fast)), 0)
        last = min(math.ceil(index(scaling.beta_slow)), config.head_dim - 1)
        kept = 1 - np.clip((np.arange(half) - first) / max(last - first, 0.001), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotation(positions: Int[Array, "batch seq"], config: RotaryConfig) -> Rotation:
    """The angles of each position, ready for `rotate`; float32 whatever is rotated."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(
        frequencies(config), jnp.float32
    )
    stretch = 1.0
    if config.scaling.kind == "yarn":
        stretch = config.scaling.attention_factor or 0.1 * math.log(config.scaling.factor) + 1
    return stretch * jnp.sin(angles), stretch * jnp.cos(angles)


def rotate(
    x: Float[Array, "batch seq heads head_dim"], rotation: Rotation
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates each pair (x[i], x[i + head_dim/2]) by its position's angle.

    The halves layout is that of Llama's published weights in the Hugging Face format.
    """
    sin, cos = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
