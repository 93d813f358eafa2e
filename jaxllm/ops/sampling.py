"""From logits to the next token: temperature, top-k, nucleus, min-p, repetition penalty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Limits(NamedTuple):
    """Which tokens may be drawn; a number a row."""

    top_k: Int[Array, " batch"]
    """The k likeliest; 0: all."""
    top_p: Float[Array, " batch"]
    """Of those, the fewest whose probabilities reach this sum (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751); 1: all."""
    min_p: Float[Array, " batch"]
    """Of those, the ones at least this times as probable as the likeliest (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082); 0: all."""


def sample(
    keys: Key[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, " batch"],
    limits: Limits | None = None,
) -> Int[Array, " batch"]:
    """Draws one token a row.

    Args:
        keys: a random key for each row, so that a row's draw does not depend on its neighbours.
        logits: float32 scores.
        temperature: divides the logits; 0 takes the likeliest token.
        limits: of what is drawn after that; None: all tokens.
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    if limits is not None:
        scaled = limited(scaled, limits)
    drawn = jax.vmap(_drawn)(keys, _in_blocks(scaled))
    return jnp.where(temperature == 0, greedy(logits), drawn).astype(jnp.int32)


def greedy(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The likeliest token of each row, of several the first."""
    # Where the maximum is takes a CPU five times as long to find as the maximum itself; so the
    # place is looked for among the maxima of blocks, and then in one block.
    blocks = _in_blocks(logits)
    best = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return (best * blocks.shape[-1] + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def _drawn(key: Key[Array, ""], blocks: Float[Array, "blocks block"]) -> Int[Array, ""]:
    """A token by its probability: first its block, then the token of that. A random number for
    each token of the vocabulary would take a third of the time of a small model on a CPU."""
    of_block, of_token = jax.random.split(key)
    block = jax.random.categorical(of_block, jax.nn.logsumexp(blocks, axis=-1))
    return block * blocks.shape[-1] + jax.random.categorical(of_token, blocks[block])


def _in_blocks(logits: Float[Array, "batch vocab"]) -> Float[Array, "batch blocks block"]:
    """About as many blocks as a block has tokens; the last is filled up with -inf."""
    batch, vocab = logits.shape
    block = 1 << (vocab.bit_length() // 2)
    filled = jnp.pad(logits, ((0, 0), (0, -vocab % block)), constant_values=-jnp.inf)
    return filled.reshape(batch, -1, block)


def limited(logits: Float[Array, "batch vocab"], limits: Limits) -> Float[Array, "batch vocab"]:
    """Sets to -inf what `limits` leave out; the likeliest token always stays.

    Tokens as likely as the k-th are all kept by `top_k`; of those as likely as the last that
    `top_p` needs, no more than it needs, the lower ids first.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    first, vocab = ranked[:, :1], logits.shape[-1]
    k = jnp.where(limits.top_k > 0, jnp.minimum(limits.top_k, vocab), vocab)
    least = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(ranked >= least, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = jnp.where(limits.top_p < 1, limits.top_p, jnp.inf)[:, None]
    kept = (ranked >= least) & (before < top_p)
    kept &= ranked >= first + jnp.log(limits.min_p)[:, None]
    count = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1)
    last = jnp.take_along_axis(ranked, count - 1, axis=-1)
    # Of the tokens that tie with the last one, as many as stand before it in the ranking.
    tied = logits == last
    room = count - jnp.sum(logits > last, axis=-1, keepdims=True)
    within = (logits > last) | (tied & (jnp.cumsum(tied, axis=-1) <= room))
    return jnp.where(within, logits, -jnp.inf)


def penalised(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    penalty: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """Logits of tokens `seen` divided by the penalty where positive, else multiplied by it
    (Keskar et al. 2019, https://arxiv.org/abs/1909.05858; as Transformers has it)."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
