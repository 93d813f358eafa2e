"""Every backend and feature against a loop over queries in float64; refusals; dtypes; leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import UserError
from jaxllm.ops.attention import (
    BACKENDS,
    Features,
    _fastest,
    attention,
    check_backend,
    chunked,
    cudnn,
)
from jaxllm.ops.attention.kernels import interpreted
from jaxllm.ops.attention.visibility import Places, Rule, visible, visible_range
from jaxllm.sharding.mesh import MeshConfig, make_mesh

KERNELS = ("pallas", "splash")
# What runs everywhere; `chunked` has two forms, of which short rows take the one written out.
IN_LOOPS = "chunked, in loops"
PLAIN = ("xla", "chunked", IN_LOOPS)
HEAD_DIM = 16

# What is asked for, beside a causal row of one to four documents.
FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 3},
    "full window": {"window": 3, "causal": False},
    "soft cap": {"soft_cap": 1.5},
    "scale": {"scale": 0.7},
    "grouped heads": {"heads": (6, 2)},
    "one key head": {"heads": (3, 1)},
    "wide values": {"value_dim": 24},
    "window, cap, scale, groups": {
        "window": 3,
        "soft_cap": 1.5,
        "scale": 0.7,
        "heads": (4, 2),
        "value_dim": 24,
    },
    "prefix": {"prefix": True},
    "all": {"prefix": True, "window": 4, "soft_cap": 3.0, "heads": (4, 2), "value_dim": 8},
    "cache": {"in_order": False},
    "cache, all": {"in_order": False, "prefix": True, "window": 4, "soft_cap": 3.0},
}
REFUSED = {
    "pallas": {"window", "full window", "soft cap", "wide values", "prefix", "all", "cache"},
    "splash": {"prefix", "all", "cache"},
}
# Compiling takes a second or more: by `make test-all`, since the others have these features too.
SELDOM = {"window", "full window", "soft cap", "scale", "one key head", "wide values"}
OFTEN = [pytest.param(x, marks=[pytest.mark.slow] if x in SELDOM else []) for x in FEATURES]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and groups of rows in the short rows of these tests."""
    monkeypatch.setattr(chunked, "_CPU_BLOCK", 4)
    monkeypatch.setattr(chunked, "_CPU_MATRICES", 4)


def loop(query, key, value, d_out, mask, scale, soft_cap):
    """Result and gradients, one query at a time; a query that sees nothing adds nothing."""
    query, key, value, d_out = (np.asarray(x, np.float64) for x in (query, key, value, d_out))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    d_query, d_key, d_value = (np.zeros_like(x) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    for b, s, h in np.ndindex(query.shape[:3]):
        seen, k = np.flatnonzero(mask[b, s]), h // group
        if not len(seen):
            continue
        scores = key[b, seen, k] @ query[b, s, h] * scale
        slope = scale
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
            slope = scale * (1 - (scores / soft_cap) ** 2)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, s, h] = weights @ value[b, seen, k]
        d_weights = value[b, seen, k] @ d_out[b, s, h]
        d_scores = weights * (d_weights - weights @ d_weights) * slope
        d_query[b, s, h] = d_scores @ key[b, seen, k]
        d_key[b, seen, k] += np.outer(d_scores, query[b, s, h])
        d_value[b, seen, k] += np.outer(weights, d_out[b, s, h])
    return out, d_query, d_key, d_value


def packed(rng, batch, seq):
    """Positions and segment ids of rows of documents, padding last."""
    positions, segment_ids = np.zeros((2, batch, seq), np.int32)
    for b in range(batch):
        ends = np.unique(rng.integers(1, seq + 1, size=4))
        for segment, (begin, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            positions[b, begin:end] = np.arange(end - begin)
            segment_ids[b, begin:end] = segment
    return positions, segment_ids


def scene(seed, batch, seq, heads=(2, 2), value_dim=HEAD_DIM, prefix=False, in_order=True, **rule):
    """Inputs, keyword arguments and mask of one call."""
    rng = np.random.default_rng(seed)
    keys = seq if in_order else seq + 3
    query = rng.normal(size=(batch, seq, heads[0], HEAD_DIM))
    key = rng.normal(size=(batch, keys, heads[1], HEAD_DIM))
    value = rng.normal(size=(batch, keys, heads[1], value_dim))
    d_out = rng.normal(size=(batch, seq, heads[0], value_dim))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value, d_out))
    if in_order:
        positions, segment_ids = packed(rng, batch, seq)
        places = (positions, positions, segment_ids, segment_ids)
    else:
        shapes = ((batch, seq), (batch, keys)) * 2
        places = tuple(
            rng.integers(0, high, shape).astype(np.int32)
            for shape, high in zip(shapes, (8, 8, 3, 3), strict=True)
        )
    names = ("query_positions", "key_positions", "query_segment_ids", "key_segment_ids")
    options = dict(zip(names, places, strict=True)) | rule | {"in_order": in_order}
    if prefix:
        options["prefix"] = np.tile(rng.integers(0, seq + 2, size=(batch, 1)), seq).astype(np.int32)
    query_at, key_at = places[0][:, :, None], places[1][:, None, :]
    mask = places[2][:, :, None] == places[3][:, None, :]
    if rule.get("causal", True):
        mask &= (key_at <= query_at) | (prefix and key_at < options["prefix"][:, :, None])
    if rule.get("window"):
        mask &= np.abs(query_at - key_at) < rule["window"]
    real = real_queries(options, mask)
    return (*arrays[:3], arrays[3] * real[..., None, None]), options, mask


def value_and_gradients(backend, arrays, options):
    """The result and the gradients of its product with d_out, jitted."""
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
    places = {name: jnp.asarray(x) for name, x in options.items() if isinstance(x, np.ndarray)}
    with pytest.MonkeyPatch.context() as patch:
        if backend == IN_LOOPS:
            patch.setattr(chunked, "_WRITTEN_OUT", 0)
        return compiled(backend, *sorted(static.items()))(*arrays, places)


@functools.cache
def compiled(backend, *static):
    def run(query, key, value, d_out, places):
        options = dict(static) | {"backend": backend.split(",")[0]}
        attend = functools.partial(attention, **places, **options)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(d_out)

    return jax.jit(run)


def assert_equals_the_loop(results, arrays, options, mask):
    scale = options.get("scale", HEAD_DIM**-0.5)
    expected = loop(*arrays, mask, scale, options.get("soft_cap", 0.0))
    for got, wanted in zip(results, expected, strict=True):
        assert np.isfinite(got).all()
        if got is results[0]:
            real = real_queries(options, mask)
            got, wanted = np.asarray(got)[real], wanted[real]
        np.testing.assert_allclose(got, wanted, rtol=3e-5, atol=3e-5)


def real_queries(options, mask):
    """Those whose result means something: neither padding nor without any key."""
    return mask.any(axis=-1) & (options["query_segment_ids"] > 0)


def check(backend, seed, batch, seq, feature):
    arrays, options, mask = scene(seed, batch, seq, **FEATURES[feature])
    assert_equals_the_loop(value_and_gradients(backend, arrays, options), arrays, options, mask)


@pytest.mark.parametrize("feature", OFTEN)
@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=4, database=None)
@given(seed=st.integers(0, 10**6))
def test_values_and_gradients_equal_a_loop(backend, feature, seed):
    check(backend, seed, 2, 13, feature)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=6, database=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), seq=st.integers(1, 20))
def test_all_shapes_equal_a_loop(backend, feature, seed, batch, seq):
    check(backend, seed, batch, seq, feature)


@pytest.mark.parametrize("feature", OFTEN)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_equal_the_loop_or_refuse(backend, feature):
    arrays, options, mask = scene(0, 1, 140, **FEATURES[feature])
    with interpreted():
        if feature.split(",")[0] in REFUSED[backend]:
            with pytest.raises(UserError, match=rf"config\.model\.attention: {backend} cannot"):
                value_and_gradients(backend, arrays, options)
        else:
            results = value_and_gradients(backend, arrays, options)
            assert_equals_the_loop(results, arrays, options, mask)


@pytest.mark.parametrize("feature", ["causal", "full window", "prefix", "grouped heads", "cache"])
def test_what_cudnn_is_asked_means_the_same(feature, monkeypatch):
    plain = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **options):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    arrays, options, mask = scene(1, 2, 13, **FEATURES[feature])
    names = ("query_positions", "key_positions", "query_segment_ids", "key_segment_ids")
    places = Places(*(jnp.asarray(options[name]) for name in names))
    if "prefix" in options:
        places = places._replace(prefix=jnp.asarray(options["prefix"]))
    rule = Rule(
        causal=options.get("causal", True),
        window=options.get("window", 0),
        soft_cap=0.0,
        scale=options.get("scale", HEAD_DIM**-0.5),
        in_order=options["in_order"],
    )
    out, pull = jax.vjp(lambda *x: cudnn.attend(*x, places, rule), *arrays[:3])
    assert_equals_the_loop((out, *pull(arrays[3])), arrays, options, mask)


@settings(max_examples=40, database=None)
@given(
    seed=st.integers(0, 10**6),
    seq=st.sampled_from([1, 9]),
    causal=st.booleans(),
    window=st.sampled_from([0, 3]),
    prefix=st.booleans(),
)
def test_the_range_of_keys_in_order_is_what_is_visible(seed, seq, causal, window, prefix):
    rule = Rule(causal=causal, window=window, soft_cap=0.0, scale=1.0, in_order=True)
    _, options, mask = scene(seed, 2, seq, prefix=prefix, causal=causal, window=window)
    at, ids = jnp.asarray(options["query_positions"]), jnp.asarray(options["query_segment_ids"])
    places = Places(at, at, ids, ids, jnp.asarray(options["prefix"]) if prefix else None)
    np.testing.assert_array_equal(visible(places, rule), mask)
    first, last = visible_range(places, rule)
    index = np.arange(seq)
    ranged = (index >= first[..., None]) & (index <= last[..., None])
    real = options["query_segment_ids"] > 0
    np.testing.assert_array_equal(ranged[real], mask[real])


def test_a_window_counts_the_query_itself_as_mistral_does():
    at, ids = jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32)
    rule = Rule(causal=True, window=2, soft_cap=0.0, scale=1.0, in_order=True)
    mask = visible(Places(at, at, ids, ids), rule)
    assert mask[0].astype(int).tolist() == np.triu(np.tri(5, dtype=int), -1).tolist()
    assert visible_range(Places(at, at, ids, ids), rule)[0].tolist() == [[0, 0, 1, 2, 3]]


@pytest.mark.parametrize("backend", [*PLAIN, *KERNELS])
def test_nothing_leaks_between_documents(backend):
    seq, cut = 20, 11
    segment_ids = np.repeat([[1, 2]], [cut, seq - cut], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(cut), np.arange(seq - cut)])[None].astype(np.int32)
    names = ("query_positions", "key_positions", "query_segment_ids", "key_segment_ids")
    places = dict(zip(names, (positions, positions, segment_ids, segment_ids), strict=True))
    arrays, _, _ = scene(3, 1, seq)
    for mine, other in ((slice(cut), slice(cut, seq)), (slice(cut, seq), slice(cut))):
        only_mine = (*arrays[:3], jnp.zeros_like(arrays[3]).at[:, mine].set(arrays[3][:, mine]))
        changed = tuple(x.at[:, other].add(100.0) for x in arrays[:3])
        with interpreted():
            options = places | {"in_order": True}
            out, *gradients = value_and_gradients(backend, only_mine, options)
            again = value_and_gradients(backend, (*changed, only_mine[3]), options)
        for gradient in gradients:
            assert np.all(np.asarray(gradient)[:, other] == 0)
            assert np.any(np.asarray(gradient)[:, mine] != 0)
        for before, after in zip((out, *gradients), again, strict=True):
            np.testing.assert_array_equal(before[:, mine], after[:, mine])


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("backend", PLAIN)
def test_queries_that_see_nothing_have_finite_results_and_gradients(backend, in_order):
    arrays, options, _ = scene(0, 1, 7, in_order=in_order)
    for name in ("query_segment_ids", "key_segment_ids"):
        options[name] = np.zeros_like(options[name])
    if not in_order:
        options["key_segment_ids"] += 1
    for result in value_and_gradients(backend, arrays, options):
        assert np.isfinite(result).all()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("backend", PLAIN)
def test_products_are_in_bfloat16_and_accumulate_in_float32(
    backend, in_order, all_equations, monkeypatch
):
    if backend == IN_LOOPS:
        backend = "chunked"
        monkeypatch.setattr(chunked, "_WRITTEN_OUT", 0)
    arrays, options, _ = scene(0, 2, 13, heads=(4, 2), in_order=in_order)
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
    places = {name: jnp.asarray(x) for name, x in options.items() if isinstance(x, np.ndarray)}

    def run(query, key, value, d_out):
        attend = functools.partial(attention, **places, **static, backend=backend)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(d_out)

    jaxpr = jax.make_jaxpr(run)(*(x.astype(jnp.bfloat16) for x in arrays))
    assert {str(x.dtype) for x in jaxpr.out_avals} == {"bfloat16"}
    equations = list(all_equations(jaxpr.jaxpr))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) >= 6
    for product in products:
        assert {str(x.aval.dtype) for x in product.invars} == {"bfloat16"}, product
        assert str(product.outvars[0].aval.dtype) == "float32", product
    exponentials = [e for e in equations if e.primitive.name == "exp"]
    assert exponentials
    assert {str(e.outvars[0].aval.dtype) for e in exponentials} == {"float32"}


@pytest.mark.parametrize("backend", PLAIN)
def test_gradients_have_the_dtypes_of_their_inputs(backend):
    arrays, options, _ = scene(0, 2, 13)
    for dtypes in (("bfloat16", "bfloat16", "float32"), ("float32", "float32", "bfloat16")):
        inputs = [x.astype(dtype) for x, dtype in zip(arrays[:3], dtypes, strict=True)]
        cotangent = arrays[3].astype(dtypes[0])
        results = value_and_gradients(backend, (*inputs, cotangent), options)
        assert [str(x.dtype) for x in results] == [dtypes[0], *dtypes]


CAUSAL = {
    "causal": True,
    "window": 0,
    "soft_cap": 0.0,
    "prefix": False,
    "head_dim": 64,
    "value_dim": 64,
}


@pytest.mark.parametrize(
    ("backend", "asked", "platform", "message"),
    [
        ("cudnn", {}, "cpu", r"cudnn cannot run on cpu .*; take xla, chunked or auto"),
        ("pallas", {}, "tpu", r"pallas cannot run on tpu .*; take xla, chunked, splash or auto"),
        ("splash", {}, "gpu", r"splash cannot run on gpu .*; take xla, chunked, cudnn, pallas or"),
        ("cudnn", {"soft_cap": 50.0}, "gpu", r"cannot cap scores .*; take xla, chunked or auto"),
        ("cudnn", {"head_dim": 20}, "gpu", r"width 20 with keys|heads of width 20|width 64"),
        ("cudnn", {"value_dim": 32}, "gpu", r"values of width 32 with keys of 64"),
        ("pallas", {"window": 8}, "gpu", r"cannot limit .* window; take xla, chunked, cudnn or"),
        ("pallas", {"soft_cap": 1.0}, "gpu", r"cannot cap scores"),
        ("pallas", {"prefix": True}, "gpu", r"cannot show a prefix"),
        ("splash", {"prefix": True}, "tpu", r"cannot show a prefix"),
        ("flash9", {}, "cpu", r"'flash9' is unknown; there are auto, xla, chunked"),
    ],
)
def test_what_a_backend_cannot_honour_is_refused_by_name(backend, asked, platform, message):
    with pytest.raises(UserError, match=rf"config\.model\.attention: .*{message}"):
        check_backend(backend, **CAUSAL | asked, platform=platform)


def test_a_kernel_that_this_jax_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"splash cannot run with jax .* has no jax\.experimental"):
        check_backend("splash", **CAUSAL, platform="tpu")


def test_a_dtype_that_a_backend_cannot_compute_in_is_refused_before_there_are_arrays():
    with pytest.raises(
        UserError, match=r"cudnn cannot compute in float32 \(bfloat16 and float16\)"
    ):
        check_backend("cudnn", **CAUSAL, platform="gpu", dtype="float32")
    check_backend("cudnn", **CAUSAL, platform="gpu", dtype="bfloat16")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("asked", [{}, {"window": 8, "soft_cap": 1.0}, {"prefix": True}])
def test_auto_xla_and_chunked_can_everything_everywhere(platform, asked):
    for backend in ("auto", "xla", "chunked"):
        assert backend in BACKENDS
        check_backend(backend, **CAUSAL | asked, platform=platform)


GPU = {"platform": "gpu", "seq": 1024, "dtype": "bfloat16"}
WIDE = {"head_dim": 256, "value_dim": 256}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"platform": "cpu", "seq": 128}, "chunked"),
        ({"platform": "cpu", "seq": 64}, "xla"),
        ({"platform": "cpu", "seq": 128, "in_order": False}, "xla"),
        ({"platform": "tpu", "seq": 1024}, "splash"),
        ({"platform": "tpu", "seq": 1024, "prefix": True}, "xla"),
        ({"platform": "tpu", "seq": 1, "in_order": False}, "xla"),
        ({"platform": "gpu", "seq": 1024, "dtype": "bfloat16"}, "cudnn"),
        ({"platform": "gpu", "seq": 4096, "dtype": "float32"}, "chunked"),
        ({"platform": "gpu", "seq": 1024, "dtype": "bfloat16", "soft_cap": 50.0}, "xla"),
        (GPU | WIDE | {"capability": "8.0"}, "xla"),
        (GPU | WIDE | {"capability": "9.0"}, "cudnn"),
        (GPU | WIDE | {"capability": "12.0"}, "cudnn"),
        (GPU | {"capability": "8.0"}, "cudnn"),
        (GPU | {"capability": "gfx942"}, "xla"),
    ],
)
def test_auto_chooses_the_fastest_that_can(options, chosen):
    assert _fastest(Features(**CAUSAL | options)) == chosen


@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 3, 3)])
@pytest.mark.parametrize("backend", [*PLAIN, *KERNELS])
def test_a_mesh_changes_no_number(backend, shape):
    batch, heads, kv_heads = shape
    arrays, options, _ = scene(0, batch, 13, heads=(heads, kv_heads))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with interpreted():
        alone = value_and_gradients(backend, arrays, options)
        with jax.set_mesh(mesh):
            spread = value_and_gradients(backend, arrays, options)
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
