"""How likely a model finds given texts: log-probabilities of continuations of contexts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer, output_head
from jaxllm.objectives.objective import Params
from jaxllm.ops.vocabulary import chunk_length, in_chunks, logits
from jaxllm.sharding.mesh import batch_sharding, batch_shards, constrain
from jaxllm.tokenizers.tokenizer import Tokenizer

# Rows are padded to a power of 2, continuations to one of 4: few programs are compiled.
_SHORTEST_ROW = 32
_SHORTEST_CONTINUATION = 8


class Pair(NamedTuple):
    """A text in two parts, as token ids."""

    context: tuple[int, ...]
    """What is given; at least the token that opens a document."""
    continuation: tuple[int, ...]
    """What is predicted."""


class LogLikelihood(NamedTuple):
    """What a model makes of a pair."""

    total: float
    """Log-probability of the continuation, in nats: the sum over its tokens."""
    tokens: tuple[float, ...]
    """Log-probability of each token of the continuation."""
    greedy: bool
    """Whether each of them is the likeliest where it stands, so that greedy decoding writes it."""
    left_out: int
    """Tokens at the beginning of the context that did not fit."""


def encode_pairs(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], parse_special_tokens: bool = False
) -> list[Pair]:
    """Pairs of (context, continuation) as ids, the context behind the opener of a document.

    Both are encoded as one text, and white space between them belongs to the continuation, so
    that words are cut as in training. A token that lies across the border is predicted.

    Args:
        tokenizer: whose ids.
        texts: the pairs.
        parse_special_tokens: read special tokens that are written out, as of a chat template.

    Raises:
        ValueError: half of a surrogate pair stands alone in a text.
    """
    contexts = [context.rstrip() for context, _ in texts]
    both = [context + continuation for context, continuation in texts]
    alone = tokenizer.encode_batch(contexts, parse_special_tokens)
    whole = tokenizer.encode_batch(both, parse_special_tokens)
    pairs = []
    for context, ids in zip(alone, whole, strict=True):
        shared = _shared_prefix(context, ids)
        pairs.append(Pair(opened(ids[:shared], tokenizer), tuple(ids[shared:])))
    return pairs


def opened(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`ids` behind the token that opens a document, unless they begin with it."""
    return tuple(ids) if ids[:1] == [tokenizer.bos_id] else (tokenizer.bos_id, *ids)


def not_finite() -> UserError:
    """What is told of a model that gives no numbers: anything measured on it would look like a
    score, and be none."""
    return UserError(
        "the model's outputs are not finite numbers: its weights are broken, or too large for its "
        "dtype; take the model of another run."
    )


def windows(pair: Pair, limit: int) -> list[Pair]:
    """`pair` in pieces that `limit` input tokens hold, each token predicted exactly once.

    A continuation that fits is one piece, behind as much of the end of the context as fits with
    it. A longer one is predicted `limit` tokens at a time, each piece behind as many of the tokens
    before it as fit. (The last token of a piece is no input.)
    """
    context, continuation = pair
    whole = context + continuation
    pieces = []
    for first in range(0, len(continuation), limit):
        piece = continuation[first : first + limit]
        end = len(context) + first
        pieces.append(Pair(whole[max(0, end - (limit - len(piece) + 1)) : end], piece))
    return pieces


def log_likelihoods(
    model: TransformerConfig,
    params: Params,
    pairs: Sequence[Pair],
    *,
    context: int,
    batch_size: int = 32,
    prompt_is_prefix: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[LogLikelihood]:
    """The log-likelihood of each continuation given its context; the mesh must be set.

    Pairs of about the same length share a batch; what a pair gets does not depend on the others.
    One longer than the model can read is scored in `windows`. The log-likelihood of a whole text,
    however long, is that of the pair whose context is only the opener of a document.

    Args:
        model: a causal one.
        params: its parameters.
        pairs: what to score.
        context: tokens that the model can read at once.
        batch_size: rows at once over all devices, rounded up to a multiple of the mesh's shards.
        prompt_is_prefix: see the context both ways, as a model trained by `prefix_lm` has learnt.
        report: told of the rows done, and of all.

    Raises:
        UserError: the model sees both ways, and so has no likelihood of a text; or what it gives
            is not finite.
    """
    if not model.causal:
        raise UserError(
            "the model sees both ways (config.model.causal=False): it fills in masked words, and "
            "gives a text no likelihood; take the run of a causal model."
        )
    pieces = [(owner, piece) for owner, p in enumerate(pairs) for piece in windows(p, context)]
    shapes = [_shape(piece, context) for _, piece in pieces]
    # The longest first: if memory does not suffice, it is told at once.
    order = sorted(range(len(pieces)), key=shapes.__getitem__, reverse=True)
    shards = batch_shards(jax.sharding.get_mesh())
    rows = -(-batch_size // shards) * shards
    scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        row_length, length = (max(shapes[n][axis] for n in chosen) for axis in (0, 1))
        batch = _batch([pieces[n][1] for n in chosen], rows, row_length, length)
        found = jax.device_get(_score(params, *batch, model=model, prefix=prompt_is_prefix))
        for row, n in enumerate(chosen):
            size = len(pieces[n][1].continuation)
            scored[n] = (found[0][row, :size], found[1][row, :size])
            if not np.isfinite(scored[n][0]).all():
                raise not_finite()
        report(min(first + rows, len(order)), len(order))
    tokens: list[list[float]] = [[] for _ in pairs]
    greedy = [True] * len(pairs)
    left_out = [0] * len(pairs)
    for number, (owner, piece) in enumerate(pieces):
        if not tokens[owner]:
            left_out[owner] = len(pairs[owner].context) - len(piece.context)
        tokens[owner] += scored[number][0].tolist()
        greedy[owner] &= bool(scored[number][1].all())
    return [
        LogLikelihood(sum(values), tuple(values), flag, missing)
        for values, flag, missing in zip(tokens, greedy, left_out, strict=True)
    ]


@partial(jax.jit, static_argnames=("model", "prefix"))
def _score(
    params: Params,
    tokens: Int[Array, "batch seq"],
    contexts: Int[Array, " batch"],
    labels: Int[Array, "batch continuation"],
    *,
    model: TransformerConfig,
    prefix: bool,
) -> tuple[Float[Array, "batch continuation"], Bool[Array, "batch continuation"]]:
    """Log-probability of each label, and whether it is the likeliest token.

    The first `contexts` tokens of a row are the context, and the labels follow from its last token
    on. What pads a row stands at its end, where nothing sees it.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    one_segment = jnp.ones_like(tokens)
    seen = jnp.broadcast_to(contexts[:, None], tokens.shape) if prefix else None
    output = Transformer(model).apply(
        {"params": params}, tokens, positions, one_segment, prefix=seen
    )
    assert isinstance(output, Output)
    places = contexts[:, None] - 1 + jnp.arange(labels.shape[1])
    places = jnp.minimum(places, tokens.shape[1] - 1)  # of padding
    hidden = jnp.take_along_axis(output.hidden, places[..., None], axis=1)
    head = output_head(model, params)

    def one_chunk(
        pair: tuple[Float[Array, "batch chunk embed"], Int[Array, "batch chunk"]],
    ) -> tuple[Float[Array, "batch chunk"], Bool[Array, "batch chunk"]]:
        scores = logits(pair[0], head)
        is_label = pair[1][..., None] == jnp.arange(scores.shape[-1])
        label_score = jnp.sum(jnp.where(is_label, scores, 0.0), axis=-1)
        log_probs = label_score - jax.nn.logsumexp(scores, axis=-1)
        return log_probs, jnp.argmax(scores, axis=-1) == pair[1]

    chunk = chunk_length(labels.shape[0], labels.shape[1], head.matrix.shape[-1])
    found = jax.lax.map(one_chunk, in_chunks((hidden, labels), chunk))

    def whole(x: Shaped[Array, "chunks batch chunk"]) -> Shaped[Array, "batch continuation"]:
        joined = jnp.moveaxis(x, 0, 1).reshape(labels.shape[0], -1)[:, : labels.shape[1]]
        return constrain(joined, None)  # every process reads all of it

    return whole(found[0]), whole(found[1])


def _shape(piece: Pair, context: int) -> tuple[int, int]:
    """Padded lengths of the row and of the continuation."""
    row = _SHORTEST_ROW
    while row < len(piece.context) + len(piece.continuation) - 1:
        row *= 2
    continuation = _SHORTEST_CONTINUATION
    while continuation < len(piece.continuation):
        continuation *= 4
    row = min(row, context)
    return row, min(continuation, row)


def _batch(
    pieces: Sequence[Pair], rows: int, row_length: int, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `_score`; each process builds its own devices' part on them."""
    tokens = np.zeros((rows, row_length), np.int32)
    contexts = np.ones(rows, np.int32)
    labels = np.zeros((rows, length), np.int32)
    for row, (context, continuation) in enumerate(pieces):
        given = (context + continuation)[:-1]
        tokens[row, : len(given)] = given
        contexts[row] = len(context)
        labels[row, : len(continuation)] = continuation
    sharding = batch_sharding(jax.sharding.get_mesh())

    def on_devices(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return on_devices(tokens), on_devices(contexts), on_devices(labels)


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
