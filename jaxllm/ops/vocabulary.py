"""Log-probabilities over the vocabulary, without ever holding [batch, seq, vocab] logits.

The sequence is cut into chunks; the logits of one chunk live at a time, and, where there are
several, are computed again in the backward pass instead of being kept. The batch stays split over
`BATCH_AXES`, the vocabulary over `tensor`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxllm.ops.products import product
from jaxllm.sharding.mesh import BATCH_AXES, constrain

# Tokens of a chunk on one device: few, so that their logits stay in a processor's cache, and enough
# for what is added to the gradient of the matrix after each chunk to be little beside the products.
_CHUNK_TOKENS = {"cpu": 512}
_CHUNK_TOKENS_ELSEWHERE = 1024
# However many they are, logits of 16 MiB are no matter.
_SMALL = 2**22


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
    if chunks == 1:  # small enough to keep for the backward pass
        return whole_log_probs(hidden, head, labels)
    # Each chunk adds to the gradient of the matrix: in float32, even where that is kept narrow.
    head = dataclasses.replace(head, matrix=head.matrix.astype(jnp.float32))
    stacked = in_chunks((hidden, labels), chunk)

    @jax.checkpoint
    def one_chunk(pair: tuple[Array, Array]) -> TokenLogProbs:
        return whole_log_probs(pair[0], head, pair[1])

    results = jax.lax.map(one_chunk, stacked)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :seq], results
    )


def whole_log_probs(
    hidden: Float[Array, "batch seq embed"], head: OutputHead, labels: Int[Array, "batch seq"]
) -> TokenLogProbs:
    """`token_log_probs` of all positions at once."""
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


def in_chunks(arrays: Any, chunk: int) -> Any:
    """Arrays [batch, seq, ...] as [chunks, batch, chunk, ...], the last filled up with zeros."""

    def cut(x: Shaped[Array, "batch seq ..."]) -> Shaped[Array, "chunks batch chunk ..."]:
        chunks = -(-x.shape[1] // chunk)
        missing = chunks * chunk - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def chunk_length(batch: int, seq: int, vocab: int) -> int:
    """Positions of a row at a time, so that a chunk has some hundred tokens on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    tokens = _CHUNK_TOKENS.get(jax.default_backend(), _CHUNK_TOKENS_ELSEWHERE)
    longest = max(1, max(tokens, _SMALL // vocab) * devices // batch)
    if longest >= seq:
        return seq
    chunks = -(-seq // longest)
    return -(-seq // chunks)
