"""How far a student's distribution over the vocabulary is from its teacher's, with its gradient.

With p of the teacher and q of the student, both at temperature T, the divergence of a token is

    forward_kl        KL(p ‖ q) = Σ p log(p/q)       covers all that the teacher may say
    reverse_kl        KL(q ‖ p) = Σ q log(q/p)       keeps to what it is likely to say
    jsd               β KL(p ‖ m) + (1-β) KL(q ‖ m), m = βp + (1-β)q: generalised Jensen-Shannon
                      (Agarwal et al. 2023, section 2, https://arxiv.org/abs/2306.13649)
    total_variation   ½ Σ |p - q|

`jsd` goes to 0 as β goes to 0 or to 1, and divided by β to the forward KL, divided by 1-β to the
reverse one. At the ends themselves it stands for these, β = 0 for KL(p ‖ q) and β = 1 for
KL(q ‖ p), undivided: there it jumps.

As in `jaxllm.ops.cross_entropy`, logits of one chunk of the sequence live at a time, of student and
teacher, and their gradient is taken while they are there. It is written out: with E = Σ q ∂D/∂q,
∂D/∂logit = q (∂D/∂q - E) / T.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.ops.vocabulary import (
    NeededFirst,
    OutputHead,
    chunk_length,
    if_any,
    in_chunks,
    on_one_device,
)
from jaxllm.ops.vocabulary import logits as logits_of

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What a student loses by differing from its teacher."""

    divergence: str = "forward_kl"
    """`forward_kl`, `reverse_kl`, `jsd` or `total_variation` (docs/distill.md)."""
    beta: float = 0.5
    """Of `jsd`: β; 0 is the forward and 1 the reverse KL."""
    temperature: float = 1.0
    """Divides the logits of both."""
    scale_by_temperature: bool = True
    """Whether the divergence counts T² times, so that its gradient keeps its size (Hinton et al.
    2015, section 2, https://arxiv.org/abs/1503.02531)."""
    alpha: float = 0.0
    """Share of the cross-entropy of the text's own tokens in the loss, at temperature 1."""

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence: must be one of {', '.join(DIVERGENCES)}; was {self.divergence!r}"
            )
        for name in ("beta", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be from 0 to 1")
        if self.divergence != "jsd" and self.beta != DivergenceConfig.beta:
            raise ValueError(f"beta: only jsd reads it, and not {self.divergence}; leave it out")
        if not 0 < self.temperature < float("inf"):
            raise ValueError("temperature: must be positive")

    @property
    def kind(self) -> str:
        """The divergence, the ends of `jsd` called by what they are."""
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return ends.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence

    @property
    def scale(self) -> float:
        """What the divergence counts in the loss."""
        squared = self.temperature**2 if self.scale_by_temperature else 1.0
        return (1 - self.alpha) * squared


class Live(NamedTuple):
    """A teacher that is asked in the step."""

    hidden: Float[Array, "batch seq width"]
    """Its last hidden states,"""
    head: OutputHead
    """and what projects them to the vocabulary, its temperature 1."""


class Stored(NamedTuple):
    """What a teacher has said before: its likeliest tokens, and by that how likely all others are
    together. The divergence is that of these k + 1 outcomes, which is at most that of all tokens
    (of the KLs by the log-sum inequality)."""

    ids: Int[Array, "batch seq k"]
    log_probs: Float[Array, "batch seq k"]
    """At the temperature of the loss."""


class DivergenceSums(NamedTuple):
    """Sums over all tokens of a batch, float32."""

    loss: Float[Array, ""]
    """Σ w·((1-α)·T²·D + α·ℓ), which can be differentiated; the others are metrics, and cannot."""
    divergence: Float[Array, ""]
    """Σ w·D."""
    cross_entropy: Float[Array, ""]
    """Σ w·ℓ of the student, ℓ = -log q(label) at temperature 1."""
    teacher: Float[Array, ""]
    """Σ w·ℓ of a live teacher, else 0."""
    agreement: Float[Array, ""]
    """Σ w where the likeliest token of both is the same."""


class _Options(NamedTuple):
    config: DivergenceConfig
    soft_cap: float
    reduction_dtype: str
    teacher_soft_cap: float
    skips: bool


def divergence_sums(
    hidden: Float[Array, "batch seq embed"],
    head: OutputHead,
    teacher: Live | Stored,
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    config: DivergenceConfig,
    chunk: int = 0,
) -> DivergenceSums:
    """The loss of a batch, and what is told of it.

    Logits of -∞ are tokens that are never said: where only one of both says a token, a KL in which
    it divides is infinite.

    Args:
        hidden: the student's last hidden states.
        head: its projection to the vocabulary.
        teacher: what it is to say.
        labels: ids in [0, vocab); what stands at positions of weight 0 does not matter.
        weights: w of each token; they are not differentiated.
        config: the loss.
        chunk: positions of the sequence at a time; 0 chooses by memory.
    """
    batch, seq, _ = hidden.shape
    chunk = chunk or chunk_length(batch, seq, head.matrix.shape[-1])
    arrays: tuple[Array, ...]
    if isinstance(teacher, Live):
        arrays, matrix, cap = (teacher.hidden,), teacher.head.matrix, teacher.head.soft_cap
    else:
        arrays, matrix, cap = tuple(teacher), None, 0.0
    # Chunks without a weight are left out; over several devices the gradients of the matrix would
    # be summed over them chunk by chunk.
    skips = chunk < seq and on_one_device()
    options = _Options(config, head.soft_cap, head.reduction_dtype, cap, skips)
    rows = (arrays, labels, weights)
    if skips:
        order = NeededFirst.of(weights > 0)
        hidden, rows = order.sorted(hidden), jax.tree.map(order.sorted, rows)
    found = DivergenceSums(*_sums(hidden, head.matrix, rows, matrix, options, chunk))
    return jax.tree.map(jax.lax.stop_gradient, found)._replace(loss=found.loss)


def outcomes(
    kind: str, beta: float, log_p: Float[Array, "*tokens n"], log_q: Float[Array, "*tokens n"]
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens n"]]:
    """The divergence of q from p, and q ∂D/∂q, up to a multiple of q.

    Args:
        kind: of `DIVERGENCES`.
        beta: of `jsd`, neither 0 nor 1.
        log_p: of each outcome; -∞: never.
        log_q: the same of the student.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward_kl":
        return jnp.sum(_times_log_ratio(p, log_p, log_q), axis=-1), -p
    if kind == "reverse_kl":
        each = _times_log_ratio(q, log_q, log_p)
        return jnp.sum(each, axis=-1), each
    if kind == "total_variation":
        apart = q - p
        return 0.5 * jnp.sum(jnp.abs(apart), axis=-1), 0.5 * q * jnp.sign(apart)
    # The sum is more than either part; where both are too small for a float, it is 0.
    most = jnp.maximum(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    log_m = jnp.maximum(jnp.log(beta * p + (1 - beta) * q), most)
    of_p, of_q = _times_log_ratio(p, log_p, log_m), _times_log_ratio(q, log_q, log_m)
    return jnp.sum(beta * of_p + (1 - beta) * of_q, axis=-1), (1 - beta) * of_q


def _times_log_ratio(
    a: Float[Array, "*tokens n"], log_a: Float[Array, "*tokens n"], log_b: Float[Array, "*tokens n"]
) -> Float[Array, "*tokens n"]:
    """a log(a/b), which is 0 where a is."""
    return jnp.where(a > 0, a * (log_a - log_b), 0.0)


class _OfTokens(NamedTuple):
    """What `DivergenceSums` are sums of, and the gradient of the loss."""

    loss: Float[Array, "batch chunk"]
    divergence: Float[Array, "batch chunk"]
    cross_entropy: Float[Array, "batch chunk"]
    teacher: Float[Array, "batch chunk"]
    agreement: Float[Array, "batch chunk"]
    slope: Float[Array, "batch chunk vocab"]
    """∂loss/∂logit."""


def _of_tokens(
    config: DivergenceConfig,
    scores: Float[Array, "batch chunk vocab"],
    teacher: Float[Array, "batch chunk vocab"] | Stored,
    labels: Int[Array, "batch chunk"],
) -> _OfTokens:
    is_label = labels[..., None] == jnp.arange(scores.shape[-1])
    log_q, log_hard = _log_probs(scores, config.temperature)
    q = jnp.exp(log_q)
    if isinstance(teacher, Stored):
        own, slope = _of_stored(config, teacher, log_q, q)
        likeliest = _scores_at(scores, teacher.ids[..., :1])[..., 0]
        # By rounding another may be as likely.
        same = likeliest >= jnp.max(scores, axis=-1)
        of_teacher = jnp.zeros_like(own)
    else:
        log_p, log_hard_p = _log_probs(teacher, config.temperature)
        own, weighted = outcomes(config.kind, config.beta, log_p, log_q)
        slope = weighted - q * jnp.sum(weighted, axis=-1, keepdims=True)
        same = _is_likeliest_of_both(scores, teacher)
        of_teacher = -_at(is_label, log_hard_p)
    cross_entropy = -_at(is_label, log_hard)
    loss, slope = config.scale * own, config.scale / config.temperature * slope
    if config.alpha:
        loss += config.alpha * cross_entropy
        slope += config.alpha * (jnp.exp(log_hard) - is_label)
    agreement = same.astype(jnp.float32)
    return _OfTokens(loss, own, cross_entropy, of_teacher, agreement, slope)


def _of_stored(
    config: DivergenceConfig,
    teacher: Stored,
    log_q: Float[Array, "batch chunk vocab"],
    q: Float[Array, "batch chunk vocab"],
) -> tuple[Float[Array, "batch chunk"], Float[Array, "batch chunk vocab"]]:
    """The divergence of k + 1 outcomes, and its gradient of log-probabilities' logits."""
    log_p = _with_rest(teacher.log_probs)
    log_q_known = _with_rest(_scores_at(log_q, teacher.ids))
    own, weighted = outcomes(config.kind, config.beta, log_p, log_q_known)
    expected = jnp.sum(weighted, axis=-1, keepdims=True)
    q_known = jnp.exp(log_q_known)
    # Of each token of the rest alike: its share of what the rest has.
    rest = jnp.where(q_known > 0, weighted / jnp.maximum(q_known, _LEAST), 0.0)[..., -1:]
    known = weighted[..., :-1] - q_known[..., :-1] * expected
    slope = q * (rest - expected)
    batch, chunk, _ = q.shape
    places = jnp.arange(batch)[:, None, None], jnp.arange(chunk)[None, :, None], teacher.ids
    return own, slope.at[places].set(known)


_LEAST = 1e-30


def _with_rest(log_probs: Float[Array, "batch chunk k"]) -> Float[Array, "batch chunk n"]:
    """With the log-probability of all other outcomes together, which rounding may make less than
    0."""
    rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    return jnp.concatenate([log_probs, jnp.log(jnp.maximum(rest, 1e-7))], axis=-1)


def _scores_at(
    scores: Float[Array, "batch chunk vocab"], ids: Int[Array, "batch chunk k"]
) -> Float[Array, "batch chunk k"]:
    return jnp.take_along_axis(scores, ids, axis=-1)


def _log_probs(
    scores: Float[Array, "batch chunk vocab"], temperature: float
) -> tuple[Float[Array, "batch chunk vocab"], Float[Array, "batch chunk vocab"]]:
    """At a temperature, and at 1."""
    plain = jax.nn.log_softmax(scores, axis=-1)
    return plain if temperature == 1 else jax.nn.log_softmax(scores / temperature), plain


def _at(
    is_label: Bool[Array, "batch chunk vocab"], values: Float[Array, "batch chunk vocab"]
) -> Float[Array, "batch chunk"]:
    # A one-hot product rather than a gather: the vocabulary may be split over devices.
    return jnp.sum(jnp.where(is_label, values, 0.0), axis=-1)


def _is_likeliest_of_both(
    scores: Float[Array, "batch chunk vocab"], teacher: Float[Array, "batch chunk vocab"]
) -> Bool[Array, "batch chunk"]:
    """Whether a token is the likeliest of both; XLA finds maxima on a CPU much faster than where
    they are."""
    both = (scores >= jnp.max(scores, axis=-1, keepdims=True)) & (
        teacher >= jnp.max(teacher, axis=-1, keepdims=True)
    )
    return jnp.any(both, axis=-1)


def _scored(
    options: _Options,
    scores: Float[Array, "batch chunk vocab"],
    teacher_matrix: Array | None,
    rows: tuple,
) -> tuple[tuple[Array, ...], Float[Array, "batch chunk vocab"]]:
    """The sums of a chunk, and the gradient of the first of the student's logits."""
    arrays, labels, weights = rows
    if teacher_matrix is None:
        said: Array | Stored = Stored(*arrays)
    else:
        said = logits_of(arrays[0], OutputHead(teacher_matrix, options.teacher_soft_cap))
    *values, slope = _of_tokens(options.config, scores, said, labels)
    # Where there is no weight stands anything, ∞ too.
    weighted = tuple(jnp.sum(jnp.where(weights > 0, weights * each, 0.0)) for each in values)
    heavy = weights[..., None]
    return weighted, jnp.where(heavy > 0, heavy * slope, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(
    hidden: Array,
    matrix: Array,
    rows: tuple,
    teacher_matrix: Array | None,
    options: _Options,
    chunk: int,
) -> tuple[Array, ...]:
    head = OutputHead(matrix, options.soft_cap, options.reduction_dtype)

    def one_chunk(total: tuple, cut: tuple) -> tuple[tuple, None]:
        hidden, rows = cut

        def compute() -> tuple[Array, ...]:
            return _scored(options, logits_of(hidden, head), teacher_matrix, rows)[0]

        return _added(total, if_any(_needed(rows, options), compute)), None

    return jax.lax.scan(one_chunk, _zeros(), in_chunks((hidden, rows), chunk))[0]


def _forward(
    hidden: Array,
    matrix: Array,
    rows: tuple,
    teacher_matrix: Array | None,
    options: _Options,
    chunk: int,
) -> tuple[tuple[Array, ...], tuple]:
    # Its gradients are float32 too, and are summed so over chunks.
    wide = matrix.astype(jnp.float32)

    def one_chunk(carry: tuple, cut: tuple) -> tuple[tuple, Array]:
        total, of_matrix = carry
        hidden, rows = cut

        def compute() -> tuple:
            scores, back = jax.vjp(
                lambda h, m: logits_of(h, OutputHead(m, options.soft_cap, options.reduction_dtype)),
                hidden,
                wide,
            )
            sums, slope = _scored(options, scores, teacher_matrix, rows)
            return sums, *back(slope)

        sums, of_hidden, more = if_any(_needed(rows, options), compute)
        return (_added(total, sums), of_matrix + more), of_hidden

    start = (_zeros(), jnp.zeros_like(wide))
    (total, of_matrix), by_chunk = jax.lax.scan(one_chunk, start, in_chunks((hidden, rows), chunk))
    of_hidden = jnp.moveaxis(by_chunk, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (of_hidden[:, : hidden.shape[1]], of_matrix.astype(matrix.dtype))


def _backward(options: _Options, chunk: int, saved: tuple, cotangents: tuple) -> tuple:
    del options, chunk
    of_hidden, of_matrix = saved
    factor = cotangents[0]
    return (
        (factor * of_hidden).astype(of_hidden.dtype),
        (factor * of_matrix).astype(of_matrix.dtype),
        None,
        None,
    )


_sums.defvjp(_forward, _backward)


def _needed(rows: tuple, options: _Options) -> Bool[Array, "batch chunk"] | None:
    return rows[2] > 0 if options.skips else None


def _zeros() -> tuple[Array, ...]:
    return tuple(jnp.zeros((), jnp.float32) for _ in DivergenceSums._fields)


def _added(total: tuple[Array, ...], more: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(one + other for one, other in zip(total, more, strict=True))
