"""Multi-head latent attention: its formulas, what its cache holds and costs, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models.attention import Context
from jaxllm.models.config import DTypes, ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.kv_cache import LatentCache, empty_cache
from jaxllm.models.latent_attention import LatentAttention
from jaxllm.models.transformer import SHARDING_RULES, Transformer, param_shapes
from jaxllm.ops.rotary import rotation
from jaxllm.planning.flops import model_training_flops_per_token
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings

WIDE = DTypes(params="float32", compute="float32", reduction="float32")
HEADS, LATENT, QUERY_LATENT, PLAIN, ROPE, VALUE = 3, 10, 9, 4, 6, 5
SIZES = {
    "width": 12,
    "heads": HEADS,
    "kv_heads": 0,
    "head_dim": PLAIN,
    "latent_width": LATENT,
    "query_latent_width": QUERY_LATENT,
    "rope_head_dim": ROPE,
    "value_head_dim": VALUE,
}
# The attention of DeepSeek-V3: https://huggingface.co/deepseek-ai/DeepSeek-V3.
DEEPSEEK_V3 = {
    "layers": 61,
    "width": 7168,
    "heads": 128,
    "head_dim": 128,
    "latent_width": 512,
    "query_latent_width": 1536,
    "rope_head_dim": 64,
    "dtype": "bfloat16",
}


def layer_of(model):
    return model.unrolled[0].attention


def context_of(config, batch, seq, begin=0):
    positions = jnp.broadcast_to(jnp.arange(begin, begin + seq), (batch, seq))
    rotations = {config.rotary: rotation(positions, config.rotary)}
    return Context(positions, jnp.ones_like(positions), rotations)


def module_and_params(model, x):
    config = layer_of(model)
    module = LatentAttention(config, WIDE)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), x, context_of(config, *x.shape[:2]))["params"]
    )
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        values = rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape)
        return jnp.asarray(values + path.endswith("scale"), jnp.float32)

    return module, trees.map_with_paths(drawn, shapes)


def turned(x, position):
    """Pairs (x[i], x[i + half]) as complex numbers, turned by their angles."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-np.arange(half) / half)
    result = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([result.real, result.imag])


def normed(x, scale, eps=1e-5):
    return x / np.sqrt(np.mean(x**2) + eps) * scale


@pytest.mark.parametrize("query_latent", [0, QUERY_LATENT])
def test_it_is_the_papers_formulas_for_each_head_and_pair(query_latent, tiny_model):
    model = tiny_model(**SIZES | {"query_latent_width": query_latent})
    x = jax.random.normal(jax.random.key(0), (1, 6, 12))
    module, params = module_and_params(model, x)
    out, _ = jax.jit(module.apply)({"params": params}, x, context_of(layer_of(model), 1, 6))

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    kernel = {name: leaf.get("kernel") for name, leaf in wide.items()}
    rows = np.asarray(x[0], np.float64)
    queries = rows
    if query_latent:
        scale = wide["query_norm"]["scale"]
        queries = np.stack([normed(row @ kernel["query_down"], scale) for row in rows])
    queries = (queries @ kernel["query"]).reshape(6, HEADS, PLAIN + ROPE)
    down = rows @ kernel["latent_down"]
    latents = np.stack([normed(row[:LATENT], wide["latent_norm"]["scale"]) for row in down])
    shared = np.stack([turned(row[LATENT:], place) for place, row in enumerate(down)])
    keys = (latents @ kernel["key"]).reshape(6, HEADS, PLAIN)
    values = (latents @ kernel["value"]).reshape(6, HEADS, VALUE)
    mixed = np.zeros((6, HEADS, VALUE))
    for place, head in np.ndindex(6, HEADS):
        query = queries[place, head]
        query[PLAIN:] = turned(query[PLAIN:], place)
        seen = slice(0, place + 1)
        scores = keys[seen, head] @ query[:PLAIN] + shared[seen] @ query[PLAIN:]
        weights = np.exp(scores / np.sqrt(PLAIN + ROPE))
        mixed[place, head] = weights / weights.sum() @ values[seen, head]
    np.testing.assert_allclose(out[0], mixed.reshape(6, -1) @ kernel["output"], atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"query_latent_width": 0}, {"family": "gemma2", "pattern": "local"}]
)
def test_a_cache_read_in_pieces_gives_what_the_whole_row_gives(options, tiny_model):
    model = tiny_model(**SIZES | options)
    config = layer_of(model)
    x = 3 * jax.random.normal(jax.random.key(0), (2, 9, 12))
    module, params = module_and_params(model, x)
    apply = jax.jit(module.apply)
    whole, _ = apply({"params": params}, x, context_of(config, 2, 9))
    cache = LatentCache(jnp.zeros((2, 1, 11, LATENT + ROPE)))
    begin = 0
    for seq in (4, 1, 1, 3):
        piece, context = x[:, begin : begin + seq], context_of(config, 2, seq, begin)
        out, cache = apply({"params": params}, piece, context, cache)
        np.testing.assert_allclose(out, whole[:, begin : begin + seq], atol=2e-5)
        begin += seq
    assert np.abs(cache.latent[:, :, :9]).min() > 0 == np.abs(cache.latent[:, :, 9:]).max()


def test_a_step_of_decoding_never_makes_the_keys_or_values_of_the_heads(tiny_model):
    model = tiny_model(**SIZES | {"heads": 6, "width": 24})
    config, keys = layer_of(model), 512
    x = jnp.ones((1, 1, 24))
    module, params = module_and_params(model, x)

    def sizes(seq, cache):
        made = jax.make_jaxpr(module.apply)(
            {"params": params}, jnp.ones((1, seq, 24)), context_of(config, 1, seq), cache
        )
        return [v.aval.size for equation in made.eqns for v in equation.outvars]

    of_heads = keys * 6 * min(PLAIN, VALUE)
    assert max(sizes(keys, None)) >= of_heads
    assert max(sizes(1, LatentCache(jnp.zeros((1, 1, keys, LATENT + ROPE))))) < of_heads


def test_the_cache_of_deepseek_v3_has_the_published_size():
    model = architecture(ModelConfig(**DEEPSEEK_V3), 10)
    cache = jax.eval_shape(lambda: empty_cache(model, 2, 5))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    # 70.272 kB a token: Zhao et al. 2025, https://arxiv.org/abs/2505.09343, table 1.
    assert held == 2 * 5 * 70_272


def test_the_attention_of_deepseek_v3_has_its_parameters():
    model = architecture(ModelConfig(**DEEPSEEK_V3), 10)
    attention = param_shapes(model)["stack_0"]["layer_0"]["attention"]
    # Queries 7168·1536 + 1536·128·192, latents 7168·576, keys and values 512·128·256, output
    # 128·128·7168, norms 1536 + 512.
    assert trees.size(attention) == 61 * 187_107_328


def test_flops_count_the_widths_of_keys_and_of_values(tiny_model):
    model = tiny_model(**SIZES)
    longer = model_training_flops_per_token(model, 9) - model_training_flops_per_token(model, 8)
    # Half of the pairs, both products, a multiply-add counted twice, three times in training.
    assert longer == 3 * model.layers * HEADS * (PLAIN + ROPE + VALUE)


def test_what_is_not_given_is_chosen():
    config = layer_of(architecture(ModelConfig(width=64, latent_width=8, rope_head_dim=4), 10))
    assert (config.plain_head_dim, config.head_dim, config.value_dim) == (16, 20, 16)
    assert config.query_latent_width == 0
    assert config.scale == 20**-0.5


def test_a_mesh_changes_no_number(tiny_model, tiny_params, packed_rows):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = tiny_model(latent_width=12, query_latent_width=8, rope_head_dim=6, kv_heads=0)
    params = tiny_params(model)
    rows = packed_rows([[8], [3, 5], [2, 6], [7]], 8)
    inputs = tuple(jnp.asarray(rows[name]) for name in ("tokens", "positions", "segment_ids"))

    @jax.jit
    def states(params, *inputs):
        return Transformer(model).apply({"params": params}, *inputs).hidden

    alone = states(params, *inputs)
    layout = shardings(params, SHARDING_RULES, mesh)
    attention = layout["stack_0"]["layer_0"]["attention"]
    assert attention["key"]["kernel"].shard_shape((3, 12, 16)) == (3, 6, 8)
    assert attention["latent_down"]["kernel"].shard_shape((3, 16, 18)) == (3, 8, 18)
    with jax.set_mesh(mesh):
        spread = states(jax.device_put(params, layout), *inputs)
    np.testing.assert_allclose(spread, alone, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_width": -1}, r"config\.model\.latent_width: must not be negative"),
        ({"rope_head_dim": 0}, r"config\.model\.rope_head_dim: .* positive, and even, .* it is 0"),
        ({"rope_head_dim": 3}, r"config\.model\.rope_head_dim: .* positive, and even, .* it is 3"),
        ({"kv_heads": 2}, r"config\.model\.kv_heads: with latent_width every head has keys"),
        ({"latent_width": 0}, r"config\.model\.rope_head_dim: belongs to latent_width"),
        ({"family": "qwen3"}, r"latent_width: the attention of 'qwen3' has norms of query and key"),
        ({"family": "qwen2"}, r"config\.model\.latent_width: the attention of 'qwen2' has biases"),
        ({"family": "gpt2"}, r"config\.model\.latent_width: the attention of 'gpt2' has biases"),
        ({"positions": "learned"}, r"latent_width: .*model\.positions is 'learned'; give"),
        ({"positions": "none"}, r"latent_width: .*config\.model\.positions is 'none'; give"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        architecture(
            from_dict(ModelConfig, {"latent_width": 8, "rope_head_dim": 4} | changes, "model"), 10
        )
