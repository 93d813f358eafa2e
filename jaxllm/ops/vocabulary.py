"""Log-probabilities over the vocabulary, without ever holding [batch, seq, vocab] logits.

The sequence is cut into chunks; the logits of one chunk live at a time, and, where there are
several, are computed again in the backward pass instead of being kept. The batch stays split over
`BATCH_AXES`, the vocabulary over `tensor`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.ops.products import product
from jaxllm.sharding.mesh import BATCH_AXES, constrain

# Tokens of a chunk on one device: few, so that their logits stay in a processor's cache, and enough
# for what is added to the gradient of the matrix after each chunk to be little beside the products.
_CHUNK_TOKENS = {"cpu": 512}
_CHUNK_TOKENS_ELSEWHERE = 4096
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
    temperature: float = 1.0
    """Divides the logits."""

    def first(self, vocab: int) -> "OutputHead":
        """Of the first so many tokens alone."""
        if vocab == self.matrix.shape[-1]:
            return self
        return dataclasses.replace(self, matrix=self.matrix[:, :vocab])


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
    if head.temperature != 1:
        result /= head.temperature
    return constrain(result, BATCH_AXES, None, "tensor")


def token_log_probs(
    hidden: Float[Array, "batch seq embed"],
    head: OutputHead,
    labels: Int[Array, "batch seq"],
    chunk: int = 0,
    needed: Bool[Array, "batch seq"] | None = None,
) -> TokenLogProbs:
    """Log-probability of each label, with the normaliser and entropy, chunk by chunk.

    Args:
        hidden: the model's last hidden states.
        head: the projection to the vocabulary.
        labels: ids in [0, vocab); what stands at positions of weight 0 does not matter.
        chunk: positions of the sequence at a time; 0 chooses by memory.
        needed: the positions whose results are read; None: all. On one device, where there are
            several chunks, these come first in their rows, so that chunks without any are left
            out; elsewhere in the result stands anything finite.
    """
    batch, seq, _ = hidden.shape
    chunk = chunk or chunk_length(batch, seq, head.matrix.shape[-1])
    chunks = -(-seq // chunk)
    if chunks == 1:  # small enough to keep for the backward pass
        return whole_log_probs(hidden, head, labels)
    # Each chunk adds to the gradient of the matrix: in float32, even where that is kept narrow.
    head = dataclasses.replace(head, matrix=head.matrix.astype(jnp.float32))
    order = None
    if not on_one_device():
        # A chunk that may be left out would have its share of the matrix's gradient summed over
        # devices by itself, where XLA sums those of all chunks once.
        needed = None
    if needed is not None:
        order = NeededFirst.of(needed)
        hidden, labels, needed = (order.sorted(x) for x in (hidden, labels, needed))

    @jax.checkpoint
    def one_chunk(arrays: tuple[Array, Array, Array | None]) -> TokenLogProbs:
        hidden, labels, needed = arrays
        return if_any(needed, lambda: whole_log_probs(hidden, head, labels))

    results = jax.lax.map(one_chunk, in_chunks((hidden, labels, needed), chunk))
    results = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :seq], results
    )
    return results if order is None else jax.tree.map(order.restored, results)


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


def likeliest(
    hidden: Float[Array, "batch seq embed"],
    head: OutputHead,
    k: int,
    temperature: float,
    chunk: int = 0,
) -> tuple[Int[Array, "batch seq k"], Float[Array, "batch seq k"]]:
    """The k likeliest tokens at each position, the likeliest first, and their log-probabilities.

    Args:
        hidden: the model's last hidden states.
        head: the projection to the vocabulary.
        k: how many; at most as many as there are.
        temperature: divides the logits.
        chunk: positions of the sequence at a time; 0 chooses by memory.
    """
    batch, seq, _ = hidden.shape
    chunk = chunk or chunk_length(batch, seq, head.matrix.shape[-1])

    def one_chunk(hidden: Array) -> tuple[Array, Array]:
        scores = logits(hidden, head) / temperature
        found, ids = jax.lax.top_k(scores, k)
        return ids, found - jax.nn.logsumexp(scores, axis=-1, keepdims=True)

    by_chunk = jax.lax.map(one_chunk, in_chunks(hidden, chunk))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, :seq], by_chunk
    )


class NeededFirst(NamedTuple):
    """An order of each row's positions in which those that are needed come first."""

    order: Int[Array, "batch seq"]
    """For each place the position that stands there,"""
    inverse: Int[Array, "batch seq"]
    """and for each position its place."""

    @classmethod
    def of(cls, needed: Bool[Array, "batch seq"]) -> "NeededFirst":
        """The order for these positions, which leaves them, and the others, as they follow each
        other."""
        order = jnp.argsort(~needed, axis=1, stable=True)
        return cls(order, jnp.argsort(order, axis=1))

    def sorted(self, x: Shaped[Array, "batch seq ..."]) -> Shaped[Array, "batch seq ..."]:
        """By place."""
        return _permuted(x, self.order, self.inverse)

    def restored(self, x: Shaped[Array, "batch seq ..."]) -> Shaped[Array, "batch seq ..."]:
        """By position again."""
        return _permuted(x, self.inverse, self.order)


@jax.custom_vjp
def _permuted(x: Array, order: Array, inverse: Array) -> Array:
    """Each row's positions in another order; differentiated by JAX itself it would scatter, which
    XLA makes one element at a time on a CPU."""
    index = order.reshape(*order.shape, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(x, index, axis=1)


_permuted.defvjp(
    lambda x, order, inverse: (_permuted(x, order, inverse), (order, inverse)),
    lambda saved, cotangent: (_permuted(cotangent, saved[1], saved[0]), None, None),
)


def if_any(needed: Bool[Array, "..."] | None, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, or, without computing it, zeros of its shapes where nothing is needed;
    None: it is."""
    if needed is None:
        return compute()
    shapes = jax.eval_shape(compute)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(jnp.any(needed), compute, zeros)


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
    devices = _devices()
    tokens = _CHUNK_TOKENS.get(jax.default_backend(), _CHUNK_TOKENS_ELSEWHERE)
    longest = max(1, max(tokens, _SMALL // vocab) * devices // batch)
    if longest >= seq:
        return seq
    chunks = -(-seq // longest)
    return -(-seq // chunks)


def on_one_device() -> bool:
    """Whether the mesh in use is of one device, or there is none."""
    return _devices() == 1


def _devices() -> int:
    """Devices of the mesh in use; without one, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size
