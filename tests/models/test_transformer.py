"""The decoder: what a hidden state may depend on, and equal ways to compute it."""

import collections
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.models import transformer
from jaxllm.models.attention import Context
from jaxllm.models.families import FAMILIES
from jaxllm.models.kv_cache import empty_cache
from jaxllm.models.parts import Norm
from jaxllm.models.transformer import Transformer, Unit, init_params, sinusoids
from jaxllm.ops.rotary import RopeScaling, RotaryConfig, rotation

INPUTS = ("tokens", "positions", "segment_ids")
SEQ = 12


def hidden_states(model, params, tokens, positions, segment_ids):
    return Transformer(model).apply({"params": params}, tokens, positions, segment_ids).hidden


forward = jax.jit(hidden_states, static_argnums=0)


def two_stacks(model):
    """The model with a second stack, whose unit has two layers."""
    (stack,) = model.stacks
    return dataclasses.replace(
        model, stacks=(stack, dataclasses.replace(stack, repeats=2, unit=stack.unit * 2))
    )


MODELS = {name: {"family": name} for name in FAMILIES} | {
    "two stacks": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "latent attention": {
        "kv_heads": 0,
        "latent_width": 12,
        "query_latent_width": 10,
        "rope_head_dim": 6,
        "value_head_dim": 5,
    },
    "yarn": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_length=8)},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_model):
    made = tiny_model(**MODELS[request.param])
    return two_stacks(made) if request.param == "two stacks" else made


@pytest.fixture(scope="module")
def params(model, tiny_params):
    return tiny_params(model)


def reach(model):
    """[query, key]: where all layers together can see, through windows one after another."""
    if any(layer.attention.window == 0 for layer in model.unrolled):
        return np.ones((SEQ, SEQ), bool)
    furthest = sum(layer.attention.window - 1 for layer in model.unrolled)
    return np.abs(np.subtract.outer(np.arange(SEQ), np.arange(SEQ))) <= furthest


def test_a_state_depends_on_its_own_past_alone(model, params, packed_rows):
    batch = packed_rows([[SEQ], [5, 4], [1, 2, 9]], SEQ)
    segments = batch["segment_ids"]
    # A token of its own at each position, so that the gradient of an embedding is that of a place.
    tokens = jnp.broadcast_to(jnp.arange(SEQ), segments.shape)
    direction = jax.random.normal(jax.random.key(1), (model.width,))

    def projections(embedding, positions, segment_ids):
        changed = params | {"embedding": embedding}
        return hidden_states(model, changed, tokens, positions, segment_ids) @ direction

    @jax.jit
    def jacobian(embedding, positions, segment_ids):
        _, pull = jax.vjp(lambda e: projections(e, positions, segment_ids), embedding)
        one_hots = jnp.eye(tokens.size).reshape(-1, *tokens.shape)
        return jax.lax.map(lambda one_hot: pull(one_hot)[0], one_hots)

    by_place = jacobian(params["embedding"], batch["positions"], batch["segment_ids"])
    by_place = by_place.reshape(*tokens.shape, *by_place.shape[1:])[:, :, :SEQ]
    depends = np.abs(by_place).max(axis=-1) > 0
    real = segments > 0
    expected = np.tril(segments[:, :, None] == segments[:, None, :]) & reach(model)
    np.testing.assert_array_equal(depends[real], expected[real])


def test_the_future_changes_no_bit_of_the_past(model, params, packed_rows):
    rows = {name: packed_rows([[SEQ]], SEQ)[name] for name in INPUTS}
    before = forward(model, params, **rows)
    rows["tokens"] = rows["tokens"].copy()
    rows["tokens"][0, 7] = (rows["tokens"][0, 7] + 1) % model.vocab_size
    after = forward(model, params, **rows)
    np.testing.assert_array_equal(after[0, :7], before[0, :7])
    changed = (np.asarray(after[0]) != np.asarray(before[0])).any(axis=-1)
    np.testing.assert_array_equal(changed[7:], reach(model)[7:, 7])


def test_packed_documents_have_the_states_they_have_alone(model, params, packed_rows):
    lengths = [4, 5, 2]
    packed = {name: packed_rows([lengths], SEQ)[name] for name in INPUTS}
    together = forward(model, params, **packed)[0]
    begin = 0
    for length in lengths:
        here = slice(begin, begin + length)
        alone = {name: np.zeros((1, SEQ), np.int32) for name in INPUTS}
        alone["tokens"][0, :length] = packed["tokens"][0, here]
        alone["positions"][0, :length] = np.arange(length)
        alone["segment_ids"][0, :length] = 1
        states = forward(model, params, **alone)[0, :length]
        np.testing.assert_allclose(together[here], states, atol=1e-5)
        begin += length


def test_the_scan_equals_a_loop_over_its_layers(model, params, packed_rows):
    rows = {name: jnp.asarray(packed_rows([[SEQ], [5, 6]], SEQ)[name]) for name in INPUTS}
    rotary = {layer.attention.rotary for layer in model.unrolled} - {None}
    rotations = {kind: rotation(rows["positions"], kind) for kind in rotary}
    context = Context(rows["positions"], rows["segment_ids"], rotations)

    @jax.jit
    def loop(params):
        x = model.embedding_scale * params["embedding"][rows["tokens"]]
        if model.learned_positions:
            x += params["position_embedding"][rows["positions"]]
        if model.sinusoidal:
            x += 0.02 * 2**0.5 * sinusoids(rows["positions"], model.width)
        for index, stack in enumerate(model.stacks):
            unit = Unit(stack, model)
            for repeat in range(stack.repeats):
                one = jax.tree.map(lambda leaf, r=repeat: leaf[r], params[f"stack_{index}"])
                x, _ = unit.apply({"params": one}, x, (jnp.int32(0), None), context)
        return Norm(model.norm, model.dtypes).apply({"params": params["final_norm"]}, x)

    np.testing.assert_allclose(forward(model, params, **rows), loop(params), atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_rematerialisation_changes_the_memory_and_no_number(
    family, tiny_model, tiny_params, packed_rows, all_equations
):
    rows = {name: jnp.asarray(packed_rows([[SEQ]], SEQ)[name]) for name in INPUTS}
    params = tiny_params(tiny_model(family=family))
    results, products, of_experts, marks = {}, {}, {}, {}
    for remat in ("none", "dots", "full"):
        model = tiny_model(family=family, remat=remat)

        def loss(params, model=model):
            return jnp.sum(jnp.sin(hidden_states(model, params, **rows)))

        step = jax.value_and_grad(loss)
        equations = all_equations(jax.make_jaxpr(step)(params).jaxpr)
        counts = collections.Counter(equation.primitive.name for equation in equations)
        marks[remat] = sum(n for name, n in counts.items() if "remat" in name or "checkp" in name)
        products[remat] = counts["dot_general"]
        of_experts[remat] = counts["ragged_dot_general"]
        results[remat] = jax.jit(step)(params)
    assert marks["none"] == 0 < min(marks["dots"], marks["full"])
    # Three forward and six backward, and with `full` the first three again but the last of them.
    if family == "mixtral":
        assert of_experts == {"none": 9, "dots": 9, "full": 12}
    else:
        assert of_experts == {"none": 0, "dots": 0, "full": 0}
    # `dots` keeps what attention gives too, and computes no product again.
    assert products["none"] == products["dots"] < products["full"]
    for remat in ("dots", "full"):
        for found, expected in zip(
            jax.tree.leaves(results[remat]), jax.tree.leaves(results["none"]), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_decoding_from_a_cache_equals_the_full_forward_pass(model, params):
    """Prompts of unequal length, padded on the right, then one token a row at a time."""
    prompt, new, length = 7, 4, 12
    lengths = np.array([7, 3, 1])
    batch = len(lengths)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, length))
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    ones = jnp.ones((batch, length), jnp.int32)
    full = forward(model, params, tokens, positions, ones)

    cached = jax.jit(
        lambda cache, tokens, positions: Transformer(model).apply(
            {"params": params}, tokens, positions, jnp.ones_like(tokens), cache
        )
    )
    padded = jnp.where(positions < lengths[:, None], tokens, 0)[:, :prompt]
    empty = empty_cache(model, batch, length, chunk=prompt)
    states, cache, _ = cached(empty, padded, positions[:, :prompt])
    for row in range(batch):
        np.testing.assert_allclose(
            states[row, : lengths[row]], full[row, : lengths[row]], atol=5e-5
        )
    rows = np.arange(batch)
    for step in range(new):
        at = lengths + step
        states, cache, _ = cached(cache, tokens[rows, at][:, None], jnp.asarray(at)[:, None])
        np.testing.assert_allclose(states[:, 0], full[rows, at], atol=5e-5)


def test_bfloat16_states_come_from_float32_parameters(tiny_model, tiny_params, packed_rows):
    rows = {name: packed_rows([[SEQ]], SEQ)[name] for name in INPUTS}
    params = tiny_params(tiny_model(), scale=1.0)
    narrow = tiny_model(dtype="bfloat16")
    made = jax.jit(init_params, static_argnums=0)(narrow, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    states = forward(narrow, params, **rows)
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        states.astype(jnp.float32), forward(tiny_model(), params, **rows), atol=0.1
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(empty_cache(narrow, 1, 2))} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_layer_is_the_identity(family, tiny_model, packed_rows):
    rows = {name: jnp.asarray(packed_rows([[SEQ]], SEQ)[name]) for name in INPUTS}
    model = tiny_model(family=family)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    bare = dataclasses.replace(model, stacks=())
    np.testing.assert_allclose(
        forward(model, params, **rows), forward(bare, params, **rows), rtol=1e-5, atol=1e-6
    )
    # What is drawn differs from layer to layer.
    query = params["stack_0"]["layer_0"]["attention"]["query"]["kernel"]
    assert len(query) == 1 or np.ptp(query, axis=0).min() > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sinusoidal_positions_are_as_large_as_the_tokens_at_the_start(family, tiny_model):
    model = dataclasses.replace(
        tiny_model(family=family, width=256, positions="sinusoidal"), stacks=()
    )
    params = init_params(model, jax.random.key(0))
    places = jnp.arange(SEQ)[None]
    # Tokens and positions, normalised together: of two equal parts each is √½ of the whole.
    hidden = hidden_states(model, params, places, places, jnp.ones_like(places))
    share = np.mean(hidden * 2**0.5 * sinusoids(places, model.width))
    np.testing.assert_allclose(share, 0.5**0.5, atol=0.05)


def test_the_program_does_not_depend_on_the_order_of_hashes(
    tiny_model, tiny_params, packed_rows, monkeypatch
):
    # As the seed of Python's hashes changes it from one process to the next.
    rows = {name: jnp.asarray(packed_rows([[SEQ]], SEQ)[name]) for name in INPUTS}
    model = tiny_model(family="gemma3")
    params = tiny_params(model)
    programs = []
    for first in (10_000.0, 1_000_000.0):
        monkeypatch.setattr(RotaryConfig, "__hash__", lambda self, x=first: int(self.theta != x))
        run = jax.make_jaxpr(lambda params: hidden_states(model, params, **rows))
        programs.append(str(run(params)))
    assert programs[0] == programs[1]


def test_reading_a_prompt_into_a_cache_takes_memory_linear_in_its_length(
    tiny_model, tiny_params, all_equations
):
    model = tiny_model()
    params = tiny_params(model)

    def largest(seq):
        def read(tokens):
            cache = empty_cache(model, 1, seq, chunk=seq)
            return Transformer(model).apply(
                {"params": params}, tokens, jnp.arange(seq)[None], jnp.ones_like(tokens), cache
            )

        equations = all_equations(jax.make_jaxpr(read)(jnp.zeros((1, seq), int)).jaxpr)
        return max(result.aval.size for equation in equations for result in equation.outvars)

    assert largest(4096) <= 8 * largest(512)


def test_dropout_is_of_training_alone_and_another_in_every_layer_and_row(
    tiny_model, tiny_params, packed_rows
):
    """In a whole model; what a place drops stands in tests/models/test_layers.py."""
    rows = {name: jnp.asarray(packed_rows([[SEQ], [SEQ]], SEQ)[name]) for name in INPUTS}
    keys = jax.random.split(jax.random.key(0), 2)
    params = tiny_params(tiny_model(), scale=1.0)

    def states(params, keys, **options):
        module = Transformer(tiny_model(**options))
        return module.apply({"params": params}, **rows, dropout_keys=keys).hidden

    plain = states(params, None)
    for options in ({"dropout": 0.5}, {"embedding_dropout": 0.5}):
        np.testing.assert_array_equal(states(params, None, **options), plain)
        assert not np.allclose(states(params, keys, **options), plain, atol=1e-2)
    both = {"dropout": 0.5, "embedding_dropout": 0.5, "reduction_dtype": "bfloat16"}
    results = []
    for remat in ("none", "full"):

        def loss(params, remat=remat):
            return jnp.sum(jnp.sin(states(params, keys, remat=remat, **both)))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for again, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


def test_every_layer_draws_its_own_dropout(tiny_model, tiny_params):
    # Three layers that add one to every feature, which dropout makes nothing or two.
    model = tiny_model(family="gpt2", dropout=0.5)
    ones = ("mlp/down/bias", "final_norm/scale")
    params = trees.map_with_paths(
        lambda path, leaf: jnp.full_like(leaf, path.endswith(ones)), tiny_params(model)
    )
    tokens = jnp.zeros((1, 8), int)
    hidden = (
        Transformer(model)
        .apply({"params": params}, tokens, tokens, tokens + 1, dropout_keys=jax.random.key(0)[None])
        .hidden
    )
    # The same draws thrice would give nothing or six.
    assert max(len(np.unique(state)) for state in np.asarray(hidden[0]).round(4)) == 4


def test_what_is_kept_for_the_backward_pass_has_the_names_that_jax_gives_it():
    """cuDNN's attention is known by the name of its primitive, which another version may change."""
    attention = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    assert transformer._keeps_products(attention._dot_product_attention_fwd_p_wrapper)
    assert not transformer._keeps_products(attention._dot_product_attention_bwd_p_wrapper)
    assert not transformer._keeps_products(jax.lax.exp_p)
