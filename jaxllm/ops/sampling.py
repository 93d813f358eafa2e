"""From logits to the next token: temperature, top-k, nucleus."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    key: Key[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    *,
    temperature: Float[Array, ""] | float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " batch"]:
    """Draws one token a row.

    Args:
        key: a random key for each row, so that a row's draw does not depend on its neighbours.
        logits: float32 scores.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: then keep the fewest tokens whose probabilities reach this sum
            (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751); 1 keeps all.
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)
    scaled = keep_top_p(keep_top_k(scaled, top_k), top_p)
    drawn = jax.vmap(jax.random.categorical)(key, scaled)
    return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Sets all but the k highest logits of each row to -inf; ties with the k-th are kept."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Sets to -inf all but the fewest likeliest tokens whose probabilities sum to at least p."""
    if p >= 1.0:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest token always stays, whatever p.
    dropped = (before >= p).at[..., 0].set(False)
    ranks = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(dropped, ranks, axis=-1), -jnp.inf, logits)
