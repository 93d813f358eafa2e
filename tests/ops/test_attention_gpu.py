"""Every attention backend of a GPU, on one: against plain attention in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.ops.attention import attention
from jaxllm.ops.attention.visibility import Places, Rule, visible

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BATCH, HEADS, HEAD_DIM = 2, 4, 64
FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 50},
    "soft cap": {"soft_cap": 1.5},
    "grouped heads": {"kv_heads": 2},
    "wide values": {"value_dim": 96},
    "prefix": {"prefix": True},
    "cache": {"in_order": False},
    "padding": {"padding": 70},
}
REFUSED = {
    "cudnn": {"soft cap", "wide values"},
    "pallas": {"window", "soft cap", "wide values", "prefix", "cache"},
}


def scene(seq, dtype, kv_heads=HEADS, value_dim=HEAD_DIM, prefix=False, padding=0, **rule):
    """Inputs and keyword arguments of one call, rounded to `dtype`; three documents a row."""
    rng = np.random.default_rng(seq)
    shapes = ((HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim), (HEADS, value_dim))
    arrays = [jnp.asarray(rng.normal(size=(BATCH, seq, *shape)), dtype) for shape in shapes]
    begins = np.zeros((BATCH, seq), bool)
    begins[:, 0] = True
    for row in begins:
        row[1 + rng.choice(seq - 1 - padding, 2, replace=False)] = True
    index = np.broadcast_to(np.arange(seq), begins.shape)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    segments = np.where(index < seq - padding, np.cumsum(begins, axis=1), 0)
    positions, segments = (jnp.asarray(x, jnp.int32) for x in (positions, segments))
    options = {
        "query_positions": positions,
        "key_positions": positions,
        "query_segment_ids": segments,
        "key_segment_ids": segments,
        "prefix": jnp.full((BATCH, seq), 20) if prefix else None,
        **{"causal": True, "in_order": True} | rule,
    }
    mask = visible(
        Places(positions, positions, segments, segments, options["prefix"]),
        Rule(options["causal"], rule.get("window", 0), 0.0, 1.0, options["in_order"]),
    )
    real = (mask.any(axis=-1) & (segments > 0))[..., None, None]
    return (*arrays[:3], arrays[3] * real), options, real


def value_and_gradients(backend, arrays, options):
    @jax.jit
    def run(query, key, value, d_out):
        attend = functools.partial(attention, backend=backend, **options)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(d_out)

    return [np.asarray(x, np.float32) for x in run(*arrays)]


def assert_near(results, wanted, real, tolerance):
    """By the norm of the difference; a query that sees nothing may have any finite result."""
    for number, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert np.isfinite(got).all()
        if number == 0:
            got, want = got * real, want * real
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < tolerance, f"{('out', 'd_query', 'd_key', 'd_value')[number]}: {error}"


@pytest.mark.parametrize("seq", [200, 1536])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("cudnn", jnp.bfloat16, 1e-2),
        ("cudnn", jnp.float16, 2e-3),
        ("pallas", jnp.bfloat16, 1e-2),
        ("pallas", jnp.float32, 2e-3),  # the GPU multiplies with 10 bits of float32's 23
        ("chunked", jnp.bfloat16, 1e-2),
        ("chunked", jnp.float32, 2e-3),
        ("xla", jnp.bfloat16, 1e-2),
        ("auto", jnp.bfloat16, 1e-2),
    ],
)
def test_values_and_gradients_are_those_of_plain_attention(backend, dtype, tolerance, feature, seq):
    arrays, options, real = scene(seq, dtype, **FEATURES[feature])
    if feature in REFUSED.get(backend, ()):
        with pytest.raises(UserError, match=rf"config\.model\.attention: {backend} cannot"):
            value_and_gradients(backend, arrays, options)
        return
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in arrays]
        wanted = value_and_gradients("xla", exact, options)
    assert_near(value_and_gradients(backend, arrays, options), wanted, np.asarray(real), tolerance)
