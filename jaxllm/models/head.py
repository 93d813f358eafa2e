"""The head that reads whole texts: hidden states pooled, and projected to a few numbers.

Its parameters stand beside those of the Transformer, as `head/kernel` [width, outputs] and
`head/bias` [outputs].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.parts import Linear


def head_outputs(
    config: TransformerConfig,
    params: trees.Tree,
    hidden: Float[Array, "batch seq embed"],
    positions: Int[Array, "batch seq"],
) -> Float[Array, "batch seq outputs"]:
    """What the head gives for each text up to each of its tokens, float32.

    At its last token it has seen all of it: this one is meant. Texts may share a row.

    Args:
        config: of a model with a head.
        params: of the model.
        hidden: last hidden states.
        positions: of each token within its text.
    """
    if config.head.pooling == "mean":
        hidden = running_mean(hidden, positions).astype(hidden.dtype)
    return _linear(config).apply({"params": params["head"]}, hidden)  # type: ignore[return-value]


def running_mean(
    hidden: Float[Array, "batch seq embed"], positions: Int[Array, "batch seq"]
) -> Float[Array, "batch seq embed"]:
    """The mean of each text's hidden states up to each token, float32."""
    begins = jnp.broadcast_to((positions == 0)[..., None], hidden.shape)

    def joined(
        before: tuple[Float[Array, "..."], Bool[Array, "..."]],
        after: tuple[Float[Array, "..."], Bool[Array, "..."]],
    ) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
        total = jnp.where(after[1], after[0], before[0] + after[0])
        return total, before[1] | after[1]

    totals, _ = jax.lax.associative_scan(joined, (hidden.astype(jnp.float32), begins), axis=1)
    return totals / (positions + 1)[..., None]


def init_head(config: TransformerConfig, key: Key[Array, ""] | None = None) -> dict:
    """The parameters of a new head, under the name that they have in a model's.

    Args:
        config: of a model with a head.
        key: of numbers drawn from N(0, 1/√(width + 1)), the standard deviation that Stiennon et
            al. 2020 (https://arxiv.org/abs/2009.01325) give; None: it gives 0 for every text.
    """
    made = _linear(config).init(jax.random.key(0), jnp.zeros((1, config.width)))["params"]
    if key is not None:
        kernel = made["kernel"]
        drawn = jax.random.normal(key, kernel.shape) / (config.width + 1) ** 0.5
        made = made | {"kernel": drawn.astype(kernel.dtype)}
    return {"head": made}


def _linear(config: TransformerConfig) -> Linear:
    outputs = config.head.outputs
    return Linear(outputs, config.dtypes, bias=True, zero_init=True, result_dtype="float32")
