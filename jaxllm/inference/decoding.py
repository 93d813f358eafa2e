"""The compiled part of generation: reading prompts, and one loop that writes for all slots.

A slot holds one request: its keys and values, where it stands, and how its next token is chosen.
What a slot writes depends on nothing of its neighbours, so a finished one can be given to another
request while the others go on.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxllm.inference.adapters import with_adapters
from jaxllm.models.config import TransformerConfig
from jaxllm.models.kv_cache import Cache, copied, empty_cache, squeezed, unsqueezed
from jaxllm.models.transformer import Output, Transformer, output_head
from jaxllm.objectives.objective import Params
from jaxllm.ops.sampling import Limits, greedy, penalised, sample
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import constrain

LONGEST_BURST = 128
"""Steps of `decode` at most; what they wrote is then read by the host at once."""


class Choice(NamedTuple):
    """How the next token of each slot is chosen; a part that no request needs is None, and is not
    computed then."""

    temperature: Float[Array, "*slots"] | None
    """None: every slot takes the likeliest."""
    limits: Limits | None
    penalty: Float[Array, "*slots"] | None
    seen: Bool[Array, "*slots vocab"] | None
    """Tokens of the text so far, where there is a penalty."""


class Slots(NamedTuple):
    """Where each slot stands; without the leading axis, one request."""

    token: Int[Array, "*slots"]
    """The last token of the text so far, which the model has not read yet."""
    position: Int[Array, "*slots"]
    """Its position."""
    left: Int[Array, "*slots"]
    """New tokens that may still be written; 0: the slot is free, or its text has ended."""
    seed: UInt32[Array, "*slots"]
    stop_ids: Int[Array, "*slots stops"]
    """Tokens that end the text; filled up with -1."""
    choice: Choice
    adapter: Int[Array, "*slots"] | None = None
    """The number of its adapter, 0 is none; None: no slot has one."""


class Burst(NamedTuple):
    """What was written in some steps."""

    tokens: Int[Array, "steps slots"]
    """-1 where a slot was idle."""
    log_probs: Float[Array, "steps slots"]
    """Of each token under the model: of all tokens, without a penalty, at temperature 1 or, where
    that is asked for, at the one that it was drawn at."""
    steps: Int[Array, ""]
    """How many steps there were."""


@partial(jax.jit, static_argnames=("model", "chunk", "prefix"))
def prefill(
    params: Params,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    model: TransformerConfig,
    chunk: int,
    prefix: bool = False,
    pairs: Params | None = None,
    adapters: Int[Array, " batch"] | None = None,
) -> Cache:
    """A cache that has read the first `lengths` tokens of each row.

    Args:
        params: of the model.
        tokens: rows padded on the right, to a multiple of `chunk`.
        lengths: tokens to read of each row.
        model: a causal one.
        chunk: tokens of a row that are read at once; memory is linear in it.
        prefix: whether all that is read sees all of it; it must be one chunk.
        pairs: of all adapters (`adapters.joined`).
        adapters: the number of each row's.
    """
    params = with_adapters(params, pairs, adapters)
    batch, length = tokens.shape
    assert length % chunk == 0 and (length == chunk or not prefix)

    def read(index: Int[Array, ""], cache: Cache) -> Cache:
        begin = index * chunk
        positions = jnp.broadcast_to(begin + jnp.arange(chunk), (batch, chunk))
        part = jax.lax.dynamic_slice_in_dim(tokens, begin, chunk, axis=1)
        inside = (positions < lengths[:, None]).astype(jnp.int32)
        seen_whole = jnp.broadcast_to(lengths[:, None], part.shape) if prefix else None
        return _read(model, params, part, positions, inside, cache, seen_whole)[1]

    cache = empty_cache(model, batch, length, chunk)
    if length == chunk:
        return read(jnp.int32(0), cache)
    return jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), read, cache)


@partial(jax.jit, donate_argnums=(0, 1))
def fill(
    slots: Slots,
    cache: Cache,
    places: Int[Array, " some"],
    requests: Slots,
    prompts: Cache | None = None,
    rows: Int[Array, " some"] | None = None,
) -> tuple[Slots, Cache]:
    """Gives the slots of `places` to requests, whose prompts are `rows` of `prompts`, from
    `prefill`; None: they are one token, which nobody has to have read. A place that is no slot is
    left out."""
    slots = jax.tree.map(
        lambda all_slots, some: all_slots.at[places].set(some, mode="drop"), slots, requests
    )
    if prompts is None or rows is None:
        return slots, cache
    return slots, copied(cache, prompts, rows, places, requests.position)


@jax.jit
def shrink(slots: Slots, cache: Cache, kept: Int[Array, " kept"]) -> tuple[Slots, Cache]:
    """Some of the slots, in the order of their numbers in `kept`."""
    fewer = jax.tree.map(lambda leaf: leaf[kept], slots)
    return fewer, jax.tree.map(lambda leaf: jnp.take(leaf, kept, axis=-4), cache)


@partial(jax.jit, static_argnames=("model", "tempered"), donate_argnums=(1, 2))
def decode(
    params: Params,
    slots: Slots,
    cache: Cache,
    going_on: Bool[Array, " slots"],
    limit: Int[Array, ""],
    until: Int[Array, ""],
    pairs: Params | None = None,
    *,
    model: TransformerConfig,
    tempered: bool = False,
) -> tuple[Slots, Cache, Burst]:
    """Writes a token in every busy slot, again and again.

    Args:
        params: of the model.
        slots, cache: where they stand; both are given back as they then stand.
        going_on: false for slots whose request the host has ended.
        limit: steps at most; at most `LONGEST_BURST`.
        until: busy slots down to which to go on.
        pairs: of all adapters (`adapters.joined`).
        model: a causal one.
        tempered: whether log-probabilities are told at the temperature of each slot.
    """
    params = with_adapters(params, pairs, slots.adapter)
    head = output_head(model, params)
    slots = slots._replace(left=jnp.where(going_on, slots.left, 0))
    count = slots.left.shape[0]
    shape = (LONGEST_BURST, count)
    burst = Burst(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.int32(0))

    def more(loop: tuple[Slots, Cache, Burst]) -> Bool[Array, ""]:
        slots, _, burst = loop
        return (burst.steps < limit) & (jnp.sum(slots.left > 0) > until)

    def step(loop: tuple[Slots, Cache, Burst]) -> tuple[Slots, Cache, Burst]:
        slots, cache, burst = loop
        busy = slots.left > 0
        hidden, cache = _read(
            model,
            params,
            slots.token[:, None],
            slots.position[:, None],
            busy[:, None].astype(jnp.int32),
            unsqueezed(cache, count),
        )
        scores = logits(hidden, head)[:, 0]
        token = _chosen(slots, scores)
        if tempered and slots.choice.temperature is not None:
            temperature = slots.choice.temperature
            scores /= jnp.where(temperature > 0, temperature, 1.0)[:, None]
        log_prob = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
        log_prob -= jax.nn.logsumexp(scores, axis=-1)
        burst = Burst(
            burst.tokens.at[burst.steps].set(jnp.where(busy, token, -1)),
            burst.log_probs.at[burst.steps].set(log_prob),
            burst.steps + 1,
        )
        return _advanced(slots, token, busy), squeezed(cache, count), burst

    begin = (slots, squeezed(cache, count), burst)
    slots, cache, burst = jax.lax.while_loop(more, step, begin)
    # Every process reads all of it.
    everywhere = constrain(burst.tokens, None), constrain(burst.log_probs, None)
    return slots, unsqueezed(cache, count), Burst(*everywhere, burst.steps)


def _read(
    model: TransformerConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"],
    cache: Cache,
    prefix: Int[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq embed"], Cache]:
    """Hidden states of some tokens, and the cache with them."""
    output = Transformer(model).apply(
        {"params": params}, tokens, positions, segment_ids, cache, prefix=prefix
    )
    assert isinstance(output, Output) and output.cache is not None
    return output.hidden, output.cache


def _chosen(slots: Slots, scores: Float[Array, "slots vocab"]) -> Int[Array, " slots"]:
    choice = slots.choice
    if choice.penalty is not None and choice.seen is not None:
        scores = penalised(scores, choice.seen, choice.penalty)
    if choice.temperature is None:
        return greedy(scores)
    # Keys by position: the same request draws the same, whatever was written beside it.
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        slots.seed, slots.position
    )
    return sample(keys, scores, choice.temperature, choice.limits)


def _advanced(slots: Slots, token: Int[Array, " slots"], busy: Bool[Array, " slots"]) -> Slots:
    """The slots after each busy one has written a token."""
    ended = jnp.any(token[:, None] == slots.stop_ids, axis=-1)
    choice = slots.choice
    if choice.seen is not None:
        rows = jnp.arange(token.shape[0])
        choice = choice._replace(seen=choice.seen.at[rows, token].max(busy))
    return slots._replace(
        token=jnp.where(busy, token, slots.token),
        position=slots.position + busy,
        left=jnp.where(busy, jnp.where(ended, 0, slots.left - 1), 0),
        choice=choice,
    )
