"""Log-probabilities over the vocabulary, without ever holding [batch, seq, vocab] logits.

The sequence is cut into chunks; the logits of one chunk live at a time, and, where there are
several, are computed again in the backward pass instead of being kept. The batch stays split over
`BATCH_AXES`, the vocabulary over `tensor`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops.products import product
from jaxllm.sharding.mesh import BATCH_AXES, constrain

# Float32 logits that one chunk may hold on one device: 2^24 elements are 64 MiB.
_CHUNK_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits."""

    matrix: Float[Array, "embed vocab"]
    """The output projection: the transposed embedding when tied."""
    soft_cap: float = 0.0
    """Logits x become c·tanh(x/c) for this c (Bello et al. 2016, as in Gemma 2); 0: never."""
    reduction_dtype: str = "float32"
    """In which the gradient of the matrix is summed."""


class TokenLogProbs(NamedTuple):
    """What losses need of each position's distribution over the vocabulary; float32."""

    log_prob: Float[Array, "batch seq"]
    """Log-probability of the label."""
    log_sum_exp: Float[Array, "batch seq"]
    """Log of the sum of the exponentiated logits: the normaliser, for z-loss."""
    entropy: Float[Array, "batch seq"]
    """Entropy of the distribution, in nats."""
    mean_log_prob: Float[Array, "batch seq"]
    """Log-probability averaged over the vocabulary, for label smoothing."""


def logits(
    hidden: Float[Array, "batch seq embed"], head: OutputHead
) -> Float[Array, "batch seq vocab"]:
    """Float32 logits of the few positions that generation samples from."""
    result = product(hidden, head.matrix, "float32", head.reduction_dtype)
    if head.soft_cap:
        result = head.soft_cap * jnp.tanh(result / head.soft_cap)
    return constrain(result, BATCH_AXES, None, "tensor")


def token_log_probs(
    hidden: Float[Array, "batch seq embed"],
    head: OutputHead,
    labels: Int[Array, "batch seq"],
    chunk: int = 0,
) -> TokenLogProbs:
    """Log-probability of each label, with the normaliser and entropy, chunk by chunk.

    Args:
        hidden: the model's last hidden states.
        head: the projection to the vocabulary.
        labels: ids in [0, vocab); what stands at positions of weight 0 does not matter.
        chunk: positions of the sequence at a time; 0 chooses by memory.
    """
    batch, seq, _ = hidden.shape
    chunk = chunk or chunk_length(batch, seq, head.matrix.shape[-1])
    chunks = -(-seq // chunk)

    def one_chunk(
        hidden: Float[Array, "batch chunk embed"], labels: Int[Array, "batch chunk"]
    ) -> TokenLogProbs:
        scores = logits(hidden, head)
        log_sum_exp = jax.nn.logsumexp(scores, axis=-1)
        # A one-hot product rather than a gather: the vocabulary may be split over devices.
        is_label = labels[..., None] == jnp.arange(scores.shape[-1])
        label_score = jnp.sum(jnp.where(is_label, scores, 0.0), axis=-1)
        expected_score = jnp.sum(jnp.exp(scores - log_sum_exp[..., None]) * scores, axis=-1)
        return TokenLogProbs(
            log_prob=label_score - log_sum_exp,
            log_sum_exp=log_sum_exp,
            entropy=log_sum_exp - expected_score,
            mean_log_prob=jnp.mean(scores, axis=-1) - log_sum_exp,
        )

    if chunks == 1:  # small enough to keep for the backward pass
        return one_chunk(hidden, labels)
    padding = chunks * chunk - seq
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)))
    # [batch, seq, ...] -> [chunks, batch, chunk, ...]
    stacked = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0),
        (hidden, labels),
    )
    results = jax.lax.map(lambda pair: jax.checkpoint(one_chunk)(*pair), stacked)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :seq], results
    )


def chunk_length(batch: int, seq: int, vocab: int) -> int:
    """Positions at a time that keep one device's logits within the chunk's memory."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    longest = max(1, _CHUNK_ELEMENTS * devices // (batch * vocab))
    if longest >= seq:
        return seq
    chunks = -(-seq // longest)
    return -(-seq // chunks)
