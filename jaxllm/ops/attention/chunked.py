"""The backend `chunked`: blocks of queries against the blocks of keys that they see.

An online softmax and a backward pass from the log-sum-exp, as in FlashAttention-2 (Dao 2023,
https://arxiv.org/abs/2307.08691), in plain JAX: memory is linear in the sequence, blocks that the
mask empties are never computed, and one block of scores stays in the processor's cache. In short
rows each block of queries meets at once all keys that causality and the window let it see, those of
other documents masked.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxllm.ops.attention.kernels import on_each_shard, padded
from jaxllm.ops.attention.visibility import MASKED, Places, Range, Rule, visible, visible_range
from jaxllm.ops.attention.xla import capped, einsum, mean_gradient, slope
from jaxllm.ops.products import PRODUCT, apart

# On a CPU small blocks of few matrices at a time stay in its cache (docs/attention.md);
# accelerators want work that is wide.
_CPU_BLOCK, _CPU_MATRICES = 64, 16
_DEVICE_BLOCK = 256
# Up to so many blocks of queries are written out, each against all keys that its place in the row
# lets it see: fewer and larger operations, but a program that grows with their number, and what
# other documents empty is computed too.
_WRITTEN_OUT = 4

Spans = tuple[tuple[int, int], ...]


class _Plan(NamedTuple):
    """What is known when the program is made."""

    rule: Rule
    block: int
    """Queries in a block."""
    key_block: int
    spans: Spans | None
    """For each block of queries the first key that it may see and one past the last; None: which
    blocks of keys it sees is found out from the mask."""


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    places: Places,
    rule: Rule,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by `rule`; memory is linear in the sequence."""
    return on_each_shard(functools.partial(_some_rows_at_a_time, rule), query, key, value, places)


def block_bounds(
    seen: Range | Places, rule: Rule, block: int, key_block: int
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """For each block of queries the first block of keys that any row needs, and one past the last.

    Args:
        seen: of whole blocks of queries and keys.
        rule: as for the attention.
        block, key_block: queries and keys in a block.
    """
    if isinstance(seen, Range):
        rows = seen.first.shape[0]
        first = jnp.min(seen.first.reshape(rows, -1, block), axis=(0, 2)) // key_block
        return first, jnp.max(seen.last.reshape(rows, -1, block), axis=(0, 2)) // key_block + 1
    rows, keys = seen.key_positions.shape

    def of_one_block(i: Int[Array, ""]) -> tuple[Array, Array]:
        needed = _mask(_queries_of(seen, i, block), 0, keys, rule, block)
        needed = needed.reshape(rows, block, -1, key_block)
        needed = jnp.any(needed, axis=(0, 1, 3))
        last = needed.size - jnp.argmax(needed[::-1])
        return jnp.argmax(needed), jnp.where(jnp.any(needed), last, 0)

    return jax.lax.map(of_one_block, jnp.arange(seen.query_positions.shape[1] // block))


def _some_rows_at_a_time(
    rule: Rule, query: Array, key: Array, value: Array, places: Places
) -> Array:
    """Cuts the batch into groups of rows, and rows into whole blocks."""
    batch, seq, heads, _ = query.shape
    on_cpu = jax.default_backend() == "cpu"
    rows = max(1, _CPU_MATRICES // heads) if on_cpu else batch
    while batch % rows:
        rows -= 1
    block = min(_CPU_BLOCK if on_cpu else _DEVICE_BLOCK, seq)
    key_block = min(_CPU_BLOCK if on_cpu else _DEVICE_BLOCK, key.shape[1])
    seen: Range | Places
    if rule.in_order:
        seen = Range(*(padded(x, block, fill="edge") for x in visible_range(places, rule)))
    else:
        # Segments that nothing else has, so that padding sees nothing and is not seen.
        seen = Places(
            padded(places.query_positions, block),
            padded(places.key_positions, key_block),
            padded(places.query_segment_ids, block, fill=-1),
            padded(places.key_segment_ids, key_block, fill=-2),
            None if places.prefix is None else padded(places.prefix, block),
        )
    whole = padded(query, block), padded(key, key_block), padded(value, key_block), seen
    groups = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), whole)
    spans = _spans(rule, whole[0].shape[1], block, places.prefix is not None)
    plan = _Plan(rule, block, key_block, spans)
    out = jax.lax.map(lambda group: _attend(*group, plan), groups)
    return out.reshape(batch, -1, *out.shape[3:])[:, :seq]


def _spans(rule: Rule, seq: int, block: int, prefix: bool) -> Spans | None:
    """`_Plan.spans` for rows of `seq` tokens, which are whole blocks."""
    if not rule.in_order or seq > _WRITTEN_OUT * block:
        return None

    def span(first: int) -> tuple[int, int]:
        begin, end = 0, first + block if rule.causal and not prefix else seq
        if rule.window:
            begin = max(0, first - rule.window + 1) // block * block
            end = min(end, -(-(first + block + rule.window - 1) // block) * block)
        return begin, end

    return tuple(span(first) for first in range(0, seq, block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, seen: Range | Places, plan: _Plan) -> Array:
    """Attention of rows that consist of whole blocks."""
    return _forward(query, key, value, seen, plan)[0]


def _forward(query: Array, key: Array, value: Array, seen: Range | Places, plan: _Plan) -> tuple:
    rule, block = plan.rule, plan.block
    queries, keys, values = _grouped(query, key), jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1)
    over_keys = _over_keys(plan, seen)

    def one_block(i: Array | int) -> tuple[Array, Array]:
        mine, seen_here = _merged(queries, i, block), _queries_of(seen, i, block)

        def add(first: Array | int, length: int, carry: tuple) -> tuple:
            mixed, top, total = carry
            their_keys, their_values = (_slice(x, first, length, axis=2) for x in (keys, values))
            scores = capped(einsum("bkqd,bktd->bkqt", mine, their_keys), rule)
            mask = _mask(seen_here, first, length, rule, mine.shape[2])
            scores = jnp.where(mask, scores, MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, decay = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            added = einsum("bkqt,bktd->bkqd", weights.astype(value.dtype), their_values)
            total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
            return mixed * decay + added, new_top, total

        shape = mine.shape[:-1]
        start = (
            jnp.zeros((*shape, value.shape[-1]), jnp.float32),
            jnp.full((*shape, 1), MASKED, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
        )
        mixed, top, total = over_keys(i, add, start)
        total = jnp.where(total == 0, 1.0, total)  # a block whose queries see nothing at all
        return (mixed / total).astype(query.dtype), top + jnp.log(total)

    if plan.spans is not None:
        blocks = [one_block(i) for i in range(len(plan.spans))]
        mixed, log_sum_exp = jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)
    else:
        mixed, log_sum_exp = jax.lax.map(one_block, jnp.arange(queries.shape[3] // block))
    # Kept where layers are computed again, which would attend again otherwise.
    out = checkpoint_name(_by_position(mixed, block), PRODUCT)
    log_sum_exp = checkpoint_name(log_sum_exp, PRODUCT)
    return out, (query, key, value, seen, out, log_sum_exp)


def _backward(plan: _Plan, saved: tuple, d_out: Array) -> tuple[Any, ...]:
    rule, block = plan.rule, plan.block
    query, key, value, seen, out, log_sum_exp = saved
    queries, keys, values = _grouped(query, key), jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1)
    out, d_out = _grouped(out, key), _grouped(d_out.astype(query.dtype), key)
    mean = mean_gradient(d_out, out)
    over_keys = _over_keys(plan, seen)

    def one_block(totals: tuple, i: Array | int) -> tuple[tuple, Array]:
        mine, d_mine, mean_here = (_merged(x, i, block) for x in (queries, d_out, mean))
        seen_here = _queries_of(seen, i, block)
        turned, d_turned = (apart(jnp.swapaxes(x, 2, 3)) for x in (mine, d_mine))

        def add(first: Array | int, length: int, carry: tuple) -> tuple:
            d_keys, d_values, d_query = carry
            their_keys, their_values = (_slice(x, first, length, axis=2) for x in (keys, values))
            scores = capped(einsum("bkqd,bktd->bkqt", mine, their_keys), rule)
            mask = _mask(seen_here, first, length, rule, mine.shape[2])
            weights = jnp.exp(jnp.where(mask, scores, MASKED) - log_sum_exp[i])
            d_weights = einsum("bkqd,bktd->bkqt", d_mine, their_values)
            d_scores = (weights * (d_weights - mean_here) * slope(scores, rule)).astype(key.dtype)
            d_query += einsum("bkqt,bktd->bkqd", d_scores, their_keys)
            d_keys = _add_at(d_keys, first, einsum("bkdq,bkqt->bkdt", turned, d_scores))
            weights = weights.astype(value.dtype)
            d_values = _add_at(d_values, first, einsum("bkdq,bkqt->bkdt", d_turned, weights))
            return d_keys, d_values, d_query

        start = (*totals, jnp.zeros(mine.shape, jnp.float32))
        d_keys, d_values, d_query = over_keys(i, add, start)
        return (d_keys, d_values), d_query.astype(query.dtype)

    # [batch, kv_heads, head_dim, keys]
    totals = tuple(jnp.zeros_like(jnp.swapaxes(x, 2, 3), jnp.float32) for x in (keys, values))
    if plan.spans is not None:
        blocks = []
        for i in range(len(plan.spans)):
            totals, d_query = one_block(totals, i)
            blocks.append(d_query)
        d_query = jnp.stack(blocks)
    else:
        totals, d_query = jax.lax.scan(one_block, totals, jnp.arange(queries.shape[3] // block))
    d_key, d_value = (
        jnp.transpose(total, (0, 3, 1, 2)).astype(like.dtype)
        for total, like in zip(totals, (key, value), strict=True)
    )
    return _by_position(d_query, block), d_key, d_value, None


_attend.defvjp(_forward, _backward)


def _over_keys(plan: _Plan, seen: Range | Places) -> Callable[..., tuple]:
    """A function of the number of a block of queries, a body `(first, length, carry) -> carry` and
    its first carry, that calls the body for all keys which the queries see."""
    if plan.spans is not None:
        spans = plan.spans

        def written_out(i: int, body: Callable[..., tuple], start: tuple) -> tuple:
            begin, end = spans[i]
            return body(begin, end - begin, start)

        return written_out
    begins, ends = block_bounds(seen, plan.rule, plan.block, plan.key_block)

    def loop(i: Array, body: Callable[..., tuple], start: tuple) -> tuple:
        def one_pair(j: Array, carry: tuple) -> tuple:
            return body(j * plan.key_block, plan.key_block, carry)

        return jax.lax.fori_loop(begins[i], ends[i], one_pair, start)

    return loop


def _add_at(total: Array, first: Array | int, part: Array) -> Array:
    """`total` with `part` added to its last axis from `first` on."""
    added = _slice(total, first, part.shape[-1], axis=3) + part
    return jax.lax.dynamic_update_slice_in_dim(total, added, first, axis=3)


def _mask(
    seen: Range | Places, first: Array | int, length: int, rule: Rule, group_block: int
) -> Bool[Array, "batch 1 group_block keys"]:
    """What the queries of `seen`, once for each head of a group, see of `length` keys from the one
    at `first` on."""
    if isinstance(seen, Range):
        index = first + jnp.arange(length)
        mask = (index >= seen.first[..., None]) & (index <= seen.last[..., None])
    else:
        here = (
            _slice(x, first, length, axis=1) for x in (seen.key_positions, seen.key_segment_ids)
        )
        positions, segment_ids = here
        mask = visible(seen._replace(key_positions=positions, key_segment_ids=segment_ids), rule)
    return jnp.tile(mask, (1, group_block // mask.shape[1], 1))[:, None]


def _queries_of(seen: Range | Places, i: Array | int, block: int) -> Range | Places:
    """`seen` of the block `i` of queries."""
    of_queries = ("first", "last", "query_positions", "query_segment_ids", "prefix")
    fields = seen._asdict().items()
    mine = {name: x for name, x in fields if name in of_queries and x is not None}
    return seen._replace(**{name: _slice(x, i * block, block, axis=1) for name, x in mine.items()})


def _slice(x: Array, first: Array | int, length: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, length, axis)


def _grouped(x: Array, key: Array) -> Float[Array, "batch kv_heads group seq width"]:
    """[batch, seq, heads, width] with the heads, as [kv_heads, group], in front."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[-1]), 1, 3)


def _merged(
    x: Float[Array, "batch kv_heads group seq width"], i: Array | int, block: int
) -> Float[Array, "batch kv_heads group_block width"]:
    """Block `i` of the queries, those of a group in one row: products are of fewer dimensions."""
    return _slice(x, i * block, block, axis=3).reshape(*x.shape[:2], -1, x.shape[-1])


def _by_position(
    blocks: Float[Array, "blocks batch kv_heads group_block width"], block: int
) -> Float[Array, "batch seq heads width"]:
    count, batch, kv_heads, group_block, width = blocks.shape
    grouped = blocks.reshape(count, batch, kv_heads, group_block // block, block, width)
    in_front = jnp.transpose(grouped, (1, 0, 4, 2, 3, 5))
    return in_front.reshape(batch, count * block, -1, width)
