"""The chunked backend leaves out blocks that nobody sees, and its memory is linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import attention, chunked
from jaxllm.ops.attention.visibility import Places, Rule, visible_range

ROW, BLOCK = 32, 4


def documents(*lengths):
    """Positions and segment ids of one row."""
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    segment_ids = jnp.repeat(jnp.arange(1, len(lengths) + 1), jnp.array(lengths))[None]
    return positions, segment_ids


def bounds(rule, positions, segment_ids, prefix=None):
    places = Places(positions, positions, segment_ids, segment_ids, prefix)
    seen = visible_range(places, rule) if rule.in_order else places
    return chunked.block_bounds(seen, rule, BLOCK, BLOCK)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("lengths", "options", "blocks"),
    [
        ((32,), {}, 8 * 9 // 2),  # the triangle
        ((32,), {"causal": False}, 64),
        ((8, 24), {}, 3 + 6 * 7 // 2),
        ((4,) * 8, {}, 8),  # the diagonal
        ((6, 26), {}, 1 + 2 + 2 + 3 + 4 + 5 + 6 + 7),  # they meet inside the second block
        ((32,), {"window": 4}, 8 + 7),  # each block and the one before
        ((32,), {"window": 5}, 8 + 7),
        ((32,), {"window": 6}, 8 + 7 + 6),
    ],
)
def test_only_blocks_that_some_query_sees_are_computed(lengths, options, blocks, in_order):
    rule = Rule(
        **{"causal": True, "window": 0} | options, soft_cap=0.0, scale=1.0, in_order=in_order
    )
    begin, end = bounds(rule, *documents(*lengths))
    assert int(jnp.sum(end - begin)) == blocks


@pytest.mark.parametrize("in_order", [True, False])
def test_a_block_that_one_row_of_a_group_needs_is_computed_for_all(in_order):
    rows = [documents(8, 24), documents(24, 8)]
    rule = Rule(causal=True, window=0, soft_cap=0.0, scale=1.0, in_order=in_order)
    alone = [bounds(rule, *row) for row in rows]
    assert [int(jnp.sum(end - begin)) for begin, end in alone] == [24, 24]
    begin, end = bounds(rule, *(jnp.concatenate(arrays) for arrays in zip(*rows, strict=True)))
    assert begin.tolist() == [0, 0, 0, 0, 0, 0, 2, 2]
    assert end.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4, 5, 6, 100])
@pytest.mark.parametrize("prefix", [False, True])
def test_spans_are_the_blocks_that_a_row_of_one_document_needs(causal, window, prefix):
    rule = Rule(causal=causal, window=window, soft_cap=0.0, scale=1.0, in_order=True)
    positions, segment_ids = documents(16)
    whole_row = jnp.full_like(positions, 16) if prefix else None
    begin, end = bounds(rule, positions, segment_ids, whole_row)
    spans = chunked._spans(rule, 16, BLOCK, prefix)
    assert [(4 * b, 4 * e) for b, e in zip(begin.tolist(), end.tolist(), strict=True)] == list(
        spans
    )


def test_long_rows_and_caches_are_not_written_out():
    rule = Rule(causal=True, window=0, soft_cap=0.0, scale=1.0, in_order=True)
    cache = Rule(causal=True, window=0, soft_cap=0.0, scale=1.0, in_order=False)
    blocks = chunked._WRITTEN_OUT
    assert len(chunked._spans(rule, blocks * BLOCK, BLOCK, False)) == blocks
    assert chunked._spans(rule, (blocks + 1) * BLOCK, BLOCK, False) is None
    assert chunked._spans(cache, BLOCK, BLOCK, False) is None


def test_a_prefix_adds_the_blocks_that_it_shows():
    positions, segment_ids = documents(16, 16)
    rule = Rule(causal=True, window=0, soft_cap=0.0, scale=1.0, in_order=True)
    begin, end = bounds(rule, positions, segment_ids, jnp.full_like(positions, 6))
    assert (begin.tolist(), end.tolist()) == ([0] * 4 + [4] * 4, [2, 2, 3, 4, 6, 6, 7, 8])


@pytest.mark.parametrize("in_order", [True, False])
def test_blocks_of_another_document_are_never_read(in_order, monkeypatch):
    # Masked numbers that were read would still spoil sums: 0 · NaN is NaN.
    monkeypatch.setattr(chunked, "_CPU_BLOCK", BLOCK)
    monkeypatch.setattr(chunked, "_WRITTEN_OUT", 0)  # where blocks are not left out
    positions, segment_ids = documents(16, 16)
    x = jax.random.normal(jax.random.key(0), (1, ROW, 2, 8))

    @jax.jit
    def run(x, cotangent):
        def attend(query, key, value):
            return attention(
                query,
                key,
                value,
                query_positions=positions,
                key_positions=positions,
                query_segment_ids=segment_ids,
                key_segment_ids=segment_ids,
                in_order=in_order,
                backend="chunked",
            )

        out, pull = jax.vjp(attend, x, x, x)
        return out, *pull(cotangent)

    first, second = slice(16), slice(16, ROW)
    for spoilt, whole in ((first, second), (second, first)):
        for result in run(x.at[:, spoilt].set(np.nan), x):
            assert np.isfinite(result[:, whole]).all()
            assert np.isnan(result[:, spoilt]).all()


def temporaries(backend, seq):
    """Bytes of a forward and backward pass over one row, by XLA's own account."""
    x = jax.ShapeDtypeStruct((1, seq, 2, 32), jnp.float32)
    row = jax.ShapeDtypeStruct((1, seq), jnp.int32)

    def run(query, key, value, positions, segment_ids):
        def total(query, key, value):
            out = attention(
                query,
                key,
                value,
                query_positions=positions,
                key_positions=positions,
                query_segment_ids=segment_ids,
                key_segment_ids=segment_ids,
                in_order=True,
                backend=backend,
            )
            return jnp.sum(out**2)

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    compiled = jax.jit(run).lower(x, x, x, row, row).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_sequence():
    chunked_bytes = [temporaries("chunked", seq) for seq in (1024, 8192)]
    assert chunked_bytes[1] < 8.5 * chunked_bytes[0]
    assert temporaries("xla", 8192) > 50 * temporaries("xla", 1024)
    assert chunked_bytes[1] < temporaries("xla", 8192) / 50
