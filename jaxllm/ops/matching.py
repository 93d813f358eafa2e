"""How far a student's inner states are from its teacher's: hidden states, and where heads look.

Both go through a learned projection, as student and teacher have other widths and heads: hidden
states as in FitNets (Romero et al. 2014, section 2.2, https://arxiv.org/abs/1412.6550), attention
as TinyBERT matches it head by head (Jiang et al. 2019, section 3,
https://arxiv.org/abs/1909.10351), but with heads mixed and distributions compared.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.attention.visibility import MASKED, Places, Rule, visible
from jaxllm.ops.attention.xla import capped, einsum
from jaxllm.ops.products import product
from jaxllm.ops.vocabulary import in_chunks

_SCORES = 2**25
"""Elements of the scores of a chunk at most, if it has more than one query."""


class Heads(NamedTuple):
    """The heads of one layer."""

    queries: Float[Array, "batch seq heads head_dim"]
    keys: Float[Array, "batch seq kv_heads head_dim"]
    rule: Rule


def hidden_error(
    hidden: Float[Array, "batch seq embed"],
    target: Float[Array, "batch seq wide"],
    projection: Float[Array, "embed wide"],
    weights: Float[Array, "batch seq"],
) -> Float[Array, ""]:
    """Σ w·|W h - t|² / |t|² over all tokens, float32.

    Relative to each token's own t, so that it means the same in every layer, and the few tokens
    whose states are enormous count as the others do.

    Args:
        hidden: h, of the student.
        target: t, of the teacher; it is not differentiated.
        projection: W.
        weights: w of each token.
    """
    # Where there is no weight stands anything.
    counted = weights > 0
    target = jax.lax.stop_gradient(jnp.where(counted[..., None], target, 0)).astype(jnp.float32)
    apart = product(hidden, projection, "float32", "float32") - target
    size = jnp.sum(jnp.square(target), axis=-1)
    relative = jnp.sum(jnp.square(apart), axis=-1) / jnp.where(size > 0, size, 1.0)
    return jnp.sum(jnp.where(counted, weights * relative, 0.0))


def attention_divergence(
    student: Heads,
    teacher: Heads,
    mix: Float[Array, "heads wide_heads"],
    places: Places,
    weights: Float[Array, "batch seq"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Σ w·KL(p ‖ q) over all tokens, in nats, float32: p is where a head of the teacher looks from
    a token, q the softmax of the student's scores mixed for that head; the mean of all heads.

    Among the keys that both can see. Scores of a chunk of queries live at a time.

    Args:
        student, teacher: the heads of both; the teacher's are not differentiated.
        mix: for each of the teacher's heads what each of the student's adds to its scores.
        places: where tokens stand.
        weights: w of each token, as a query.
        chunk: queries of a row at a time; 0 chooses by memory.
    """
    batch, seq = weights.shape
    most = max(student.queries.shape[2], teacher.queries.shape[2])
    chunk = chunk or max(1, min(seq, _SCORES // (batch * most * seq)))
    queries, keys = jax.lax.stop_gradient((teacher.queries, teacher.keys))
    teacher = Heads(queries, keys, teacher.rule)

    @jax.checkpoint
    def one_chunk(
        ours: Array, theirs: Array, positions: Array, segment_ids: Array, weights: Array
    ) -> Float[Array, ""]:
        here = places._replace(query_positions=positions, query_segment_ids=segment_ids)
        seen = visible(here, student.rule) & visible(here, teacher.rule)
        log_softmax = functools.partial(_log_softmax, seen=seen[:, None])
        # Scores of some tens would lose all below a tenth in bfloat16.
        scores = _scores(student._replace(queries=ours))
        mixed = einsum("bhqt,hg->bgqt", scores, mix, precision="highest")
        log_q = log_softmax(mixed)
        log_p = log_softmax(_scores(teacher._replace(queries=theirs)))
        apart = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.sum(jnp.where(weights > 0, weights * jnp.mean(apart, axis=1), 0.0))

    by_chunk = in_chunks(
        (
            student.queries,
            teacher.queries,
            places.query_positions,
            places.query_segment_ids,
            weights,
        ),
        chunk,
    )
    total = jnp.zeros((), jnp.float32)
    return jax.lax.scan(lambda sum, cut: (sum + one_chunk(*cut), None), total, by_chunk)[0]


def _scores(heads: Heads) -> Float[Array, "batch heads seq keys"]:
    """Scores of each query, before what it can't see is masked."""
    batch, seq, count, width = heads.queries.shape
    kv_heads = heads.keys.shape[2]
    grouped = heads.queries.reshape(batch, seq, kv_heads, -1, width)
    products = einsum("bqkgd,btkd->bkgqt", grouped, heads.keys)
    return capped(products.reshape(batch, count, seq, -1), heads.rule)


def _log_softmax(
    scores: Float[Array, "batch heads seq keys"], seen: Array
) -> Float[Array, "batch heads seq keys"]:
    return jax.nn.log_softmax(jnp.where(seen, scores, MASKED), axis=-1)
