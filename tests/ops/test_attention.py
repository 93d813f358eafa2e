"""Attention against a loop over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.ops.attention import BACKENDS, attention, visible

BATCH, KEYS, HEAD_DIM = 2, 6, 4

attend = jax.jit(attention, static_argnames="backend")


def reference(query, key, value, mask):
    """One query at a time; NaN where a query sees nothing."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, seq, heads, head_dim = query.shape
    group = heads // key.shape[2]
    out = np.full(query.shape, np.nan)
    for b in range(batch):
        for s in range(seq):
            seen = np.flatnonzero(mask[b, s])
            for h in range(heads):
                if len(seen):
                    scores = key[b, seen, h // group] @ query[b, s, h] / np.sqrt(head_dim)
                    weights = np.exp(scores - scores.max())
                    out[b, s, h] = weights @ value[b, seen, h // group] / weights.sum()
    return out


def integers(low, high, seq):
    row = st.lists(st.integers(low, high), min_size=seq, max_size=seq)
    return st.lists(row, min_size=BATCH, max_size=BATCH).map(lambda x: np.array(x, np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_a_loop_over_what_each_query_sees(backend, data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    seq = data.draw(st.sampled_from([1, KEYS]))
    where = {
        "query_positions": data.draw(integers(0, 4, seq)),
        "key_positions": data.draw(integers(0, 4, KEYS)),
        "query_segment_ids": data.draw(integers(0, 2, seq)),
        "key_segment_ids": data.draw(integers(0, 2, KEYS)),
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scale = data.draw(st.sampled_from([1.0, 30.0]))
    query = rng.normal(size=(BATCH, seq, heads, HEAD_DIM)).astype(np.float32) * scale
    key, value = rng.normal(size=(2, BATCH, KEYS, kv_heads, HEAD_DIM)).astype(np.float32)
    mask = np.array(
        [
            [
                [
                    where["query_segment_ids"][b, s] == where["key_segment_ids"][b, t]
                    and where["query_positions"][b, s] >= where["key_positions"][b, t]
                    for t in range(KEYS)
                ]
                for s in range(seq)
            ]
            for b in range(BATCH)
        ]
    )
    arrays = {name: jnp.asarray(array) for name, array in where.items()}
    np.testing.assert_array_equal(visible(*arrays.values()), mask)
    out = attend(*map(jnp.asarray, (query, key, value)), **arrays, backend=backend)
    expected = reference(query, key, value, mask)
    assert np.isfinite(out).all()
    seen = mask.any(axis=-1)
    np.testing.assert_allclose(np.asarray(out)[seen], expected[seen], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_has_finite_gradients(backend):
    nowhere = jnp.ones((1, 3), jnp.int32)

    def total(x):
        return jnp.sum(
            attention(
                x,
                x,
                x,
                query_positions=nowhere,
                key_positions=nowhere + 1,
                query_segment_ids=nowhere,
                key_segment_ids=nowhere,
                backend=backend,
            )
            ** 2
        )

    gradient = jax.grad(total)(jax.random.normal(jax.random.key(0), (1, 3, 2, 4)))
    assert np.isfinite(gradient).all()


def test_the_result_has_the_dtype_of_the_query_and_scores_are_float32():
    x = jnp.ones((1, 4, 2, 4), jnp.bfloat16)
    places = jnp.zeros((1, 4), jnp.int32)
    jaxpr = jax.make_jaxpr(
        lambda x: attention(
            x,
            x,
            x,
            query_positions=places,
            key_positions=places,
            query_segment_ids=places,
            key_segment_ids=places,
        )
    )(x)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    exponentials = [e for e in jaxpr.eqns if e.primitive.name == "exp"]
    assert exponentials
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in exponentials)
