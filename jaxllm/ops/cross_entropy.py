"""Cross-entropy over the vocabulary, with its gradient made in the forward pass.

A loss is one number, so its gradient is known up to a factor before the backward pass begins.
While a chunk's logits are there, their gradient is taken too: logits are neither kept nor computed
a second time, as they are where every token's log-probability may be differentiated
(`jaxllm.ops.vocabulary`). The idea is that of Hsu et al. 2024, https://arxiv.org/abs/2410.10989.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops.vocabulary import OutputHead, chunk_length, in_chunks, whole_log_probs


class CrossEntropySums(NamedTuple):
    """Sums over all tokens of a batch, float32."""

    loss: Float[Array, ""]
    """Σ w·ℓ, which can be differentiated."""
    log_prob: Float[Array, ""]
    """Σ w·log p(label), which is a metric: it has no gradient."""


class _Options(NamedTuple):
    soft_cap: float
    reduction_dtype: str
    label_smoothing: float
    z_loss: float


def cross_entropy_sums(
    hidden: Float[Array, "batch seq embed"],
    head: OutputHead,
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> CrossEntropySums:
    """The sums of ℓ = -(1-ε) log p(label) - ε mean over the vocabulary of log p + z·log²Z.

    Args:
        hidden: the model's last hidden states.
        head: the projection to the vocabulary.
        labels: ids in [0, vocab); what stands at positions of weight 0 does not matter.
        weights: w of each token.
        label_smoothing: ε (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
        z_loss: z; Z is the softmax normaliser (Chowdhery et al. 2022, section 5,
            https://arxiv.org/abs/2204.02311).
        chunk: positions of the sequence at a time; 0 chooses by memory.
    """
    batch, seq, _ = hidden.shape
    chunk = chunk or chunk_length(batch, seq, head.matrix.shape[-1])
    options = _Options(head.soft_cap, head.reduction_dtype, label_smoothing, z_loss)
    loss, log_prob = _sums(hidden, head.matrix, labels, weights, options, chunk)
    return CrossEntropySums(loss, jax.lax.stop_gradient(log_prob))


def _of_chunk(
    hidden: Float[Array, "batch chunk embed"],
    matrix: Float[Array, "embed vocab"],
    weights: Float[Array, "batch chunk"],
    labels: Int[Array, "batch chunk"],
    options: _Options,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    head = OutputHead(matrix, options.soft_cap, options.reduction_dtype)
    scores = whole_log_probs(hidden, head, labels)
    smoothing = options.label_smoothing
    loss = -(1 - smoothing) * scores.log_prob - smoothing * scores.mean_log_prob
    if options.z_loss:
        loss += options.z_loss * jnp.square(scores.log_sum_exp)
    return jnp.sum(weights * loss), jnp.sum(weights * scores.log_prob)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(
    hidden: Array, matrix: Array, labels: Array, weights: Array, options: _Options, chunk: int
) -> tuple[Array, Array]:
    def one_chunk(total: tuple, rows: tuple) -> tuple[tuple, None]:
        hidden, labels, weights = rows
        return _added(total, _of_chunk(hidden, matrix, weights, labels, options)), None

    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return jax.lax.scan(one_chunk, start, in_chunks((hidden, labels, weights), chunk))[0]


def _forward(
    hidden: Array, matrix: Array, labels: Array, weights: Array, options: _Options, chunk: int
) -> tuple[tuple[Array, Array], tuple]:
    gradient = jax.value_and_grad(_of_chunk, (0, 1, 2), has_aux=True)

    def one_chunk(carry: tuple, rows: tuple) -> tuple[tuple, tuple]:
        total, of_matrix = carry
        hidden, labels, weights = rows
        sums, (of_hidden, more, of_weights) = gradient(hidden, wide, weights, labels, options)
        return (_added(total, sums), of_matrix + more), (of_hidden, of_weights)

    # Its gradients are float32 too, and are summed so over chunks.
    wide = matrix.astype(jnp.float32)
    start = ((jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)), jnp.zeros_like(wide))
    rows = in_chunks((hidden, labels, weights), chunk)
    (total, of_matrix), by_chunk = jax.lax.scan(one_chunk, start, rows)
    seq = hidden.shape[1]
    of_hidden, of_weights = (
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :seq] for x in by_chunk
    )
    return total, (of_hidden, of_matrix.astype(matrix.dtype), of_weights)


def _backward(options: _Options, chunk: int, saved: tuple, cotangents: tuple) -> tuple:
    del options, chunk
    of_hidden, of_matrix, of_weights = saved
    factor = cotangents[0]
    return (
        (factor * of_hidden).astype(of_hidden.dtype),
        (factor * of_matrix).astype(of_matrix.dtype),
        None,
        factor * of_weights,
    )


_sums.defvjp(_forward, _backward)


def _added(total: tuple[Array, Array], more: tuple[Array, Array]) -> tuple[Array, Array]:
    return total[0] + more[0], total[1] + more[1]
