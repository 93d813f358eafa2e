"""Adapters in PEFT's format: what is written is read, and PEFT computes the same as we do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxllm import trees
from jaxllm.conversion.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, write_adapter
from jaxllm.conversion.reading import read_params
from jaxllm.conversion.tables import TABLES
from jaxllm.errors import UserError
from jaxllm.models import lora
from jaxllm.models.families import architecture
from jaxllm.models.lora import LoraConfig, merged, pair_shapes
from jaxllm.models.transformer import Transformer, output_head, param_shapes
from jaxllm.ops.vocabulary import logits

VOCAB = 24
FAMILIES = ("llama", "gpt2", "qwen3", "gemma3")
OPTIONS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.1},
    "attention alone": {"pattern": r".*attention/(query|value)/kernel"},
}


def drawn(shapes, config, seed=0):
    """Random pairs, magnitudes about 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        if path.endswith((lora.SCALE, lora.DROPOUT)):
            value = config.scale if path.endswith(lora.SCALE) else config.dropout
            return np.full(shape.shape, value, np.float32)
        about = 1.0 if path.endswith(lora.MAGNITUDE) else 0.0
        return (about + 0.3 * draw.normal(size=shape.shape)).astype(np.float32)

    return trees.map_with_paths(leaf, pair_shapes(shapes, config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_is_read(family, name, config_of, tmp_path):
    model = architecture(config_of(family), VOCAB)
    config = LoraConfig(rank=2, alpha=6.0, **OPTIONS[name])
    shapes = param_shapes(model)
    pairs, table = drawn(shapes, config), TABLES[family]
    write_adapter(tmp_path / "adapter", "base", config, pairs, model, table)
    found_config, found = read_adapter(tmp_path / "adapter", model, table)
    for field in ("alpha", "dropout", "rslora", "dora"):
        assert getattr(found_config, field) == getattr(config, field)
    base = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    arrays = (jax.tree.map(jnp.asarray, trees.merge(base, own)) for own in (pairs, found))
    expected, whole = map(merged, arrays)
    for path, leaf in trees.leaves_with_paths(expected):
        own = dict(trees.leaves_with_paths(whole))[path]
        np.testing.assert_allclose(own, leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    if family != "gpt2":  # whose three pairs are one of theirs, and come back as three of its rank
        jax.tree.map(np.testing.assert_array_equal, found, pairs)


def test_pairs_beside_table_and_output(config_of, tmp_path):
    model = architecture(config_of("llama", tied=False), VOCAB)
    config = LoraConfig(rank=2, pattern="embedding|output")
    pairs = drawn(param_shapes(model), config)
    write_adapter(tmp_path / "a", "base", config, pairs, model, TABLES["llama"])
    names = safetensors.numpy.load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
    assert {name: array.shape for name, array in names.items()} == {
        "base_model.model.model.embed_tokens.lora_embedding_A": (2, VOCAB),
        "base_model.model.model.embed_tokens.lora_embedding_B": (8, 2),
        "base_model.model.lm_head.lora_A.weight": (2, 8),
        "base_model.model.lm_head.lora_B.weight": (VOCAB, 2),
    }
    _, found = read_adapter(tmp_path / "a", model, TABLES["llama"])
    jax.tree.map(np.testing.assert_array_equal, found, pairs)


def test_layers_and_ranks_may_differ(config_of, tmp_path):
    model = architecture(config_of("llama"), VOCAB)
    config = LoraConfig(rank=2, pattern=".*query/kernel")
    pairs = drawn(param_shapes(model), config)
    write_adapter(tmp_path / "a", "base", config, pairs, model, TABLES["llama"])
    path = tmp_path / "a" / ADAPTER_WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    kept = {name: array for name, array in tensors.items() if ".layers.0." not in name}
    for name in kept:
        if ".layers.1." in name:
            kept[name] = kept[name][:1] if "lora_A" in name else kept[name][:, :1].copy()
    safetensors.numpy.save_file(kept, path)
    told = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    told |= {"rank_pattern": {"layers.1.self_attn.q_proj": 1}}
    told |= {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}}
    (tmp_path / "a" / ADAPTER_CONFIG).write_text(json.dumps(told))
    _, found = read_adapter(tmp_path / "a", model, TABLES["llama"])
    query = found["stack_0"]["layer_0"]["attention"]["query"]
    before = pairs["stack_0"]["layer_0"]["attention"]["query"]
    assert not query["kernel_lora_b"][0].any()
    np.testing.assert_array_equal(query["kernel_lora_a"][1, :, 0], before["kernel_lora_a"][1, :, 0])
    assert not query["kernel_lora_a"][1, :, 1].any()
    np.testing.assert_array_equal(query["kernel_lora_scale"], np.float32([8, 5, 8]))
    np.testing.assert_array_equal(query["kernel_lora_b"][2], before["kernel_lora_b"][2])


@pytest.fixture
def written(config_of, tmp_path):
    """An adapter, whose files a test may spoil, and what reads it."""
    model = architecture(config_of("llama"), VOCAB)
    config = LoraConfig(rank=2, pattern=".*query/kernel")
    folder = tmp_path / "adapter"
    table = TABLES["llama"]
    write_adapter(folder, "base", config, drawn(param_shapes(model), config), model, table)

    def spoil(fields=None, rename=None, size=None):
        told = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(told | (fields or {})))
        path = folder / ADAPTER_WEIGHTS
        tensors = safetensors.numpy.load_file(path)
        if rename:
            tensors = {name.replace(*rename): array for name, array in tensors.items()}
        safetensors.numpy.save_file(tensors, path)
        if size:
            path.write_bytes(path.read_bytes()[:size])
        return lambda: read_adapter(folder, model, table)

    return spoil


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"peft_type": "IA3"}}, "peft_type is 'IA3', and only LORA is known"),
        ({"fields": {"bias": "all"}}, "bias is 'all', which is not known"),
        ({"fields": {"modules_to_save": ["lm_head"]}}, "modules_to_save is"),
        ({"fields": {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa'"),
        ({"fields": {"use_dora": True}}, "only 0 of the 3 layers have a magnitude"),
        ({"fields": {"r": 0}}, "r is 0, and must be a positive number"),
        ({"rename": ("q_proj", "c_attn")}, r"c_attn\.lora_A\.weight is beside no matrix"),
        ({"rename": ("layers.2", "layers.3")}, r"layers\.3.* is beside no matrix"),
        (
            {"rename": ("layers.0.self_attn.q_proj.lora_B", "layers.9.x")},
            r"lora_B\.weight is missing",
        ),
        ({"rename": ("q_proj", "k_proj")}, r"do not fit model\.layers\.0\.self_attn\.k_proj"),
        ({"size": 100}, "is cut short or damaged"),
    ],
)
def test_what_does_not_fit_is_told(options, message, written):
    with pytest.raises(UserError, match=message):
        written(**options)()


@pytest.mark.parametrize(
    ("family", "pattern", "message"),
    [
        ("llama", "embedding", "the embedding of a tied model"),
        ("mixtral", ".*/experts/.*", "no place for the pairs of experts"),
    ],
)
def test_what_has_no_place_is_told(family, pattern, message, config_of, tmp_path):
    model = architecture(config_of(family), VOCAB)
    config = LoraConfig(rank=2, pattern=pattern)
    pairs = drawn(param_shapes(model), config)
    with pytest.raises(UserError, match=message):
        write_adapter(tmp_path / "a", "base", config, pairs, model, TABLES[family])


def our_logits(model, params, tokens):
    params, tokens = jax.tree.map(jnp.asarray, (params, tokens))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = (
        Transformer(model)
        .apply({"params": params}, tokens, positions, jnp.ones_like(tokens))
        .hidden
    )
    return np.asarray(logits(hidden, output_head(model, params)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["plain", "rslora", "dora", "attention alone"])
def test_peft_computes_the_same(family, name, config_of, publish, one_device, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = config_of(family)
    publish(tmp_path / "base", config)
    model = architecture(config, VOCAB)
    base = read_params(tmp_path / "base", model, one_device)
    base = jax.tree.map(lambda leaf: 0.3 * leaf, base)
    tokens = np.random.default_rng(1).integers(4, VOCAB, (2, 9)).astype(np.int32)

    def theirs():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.mul_(0.3)
        return loaded.eval()

    def their_logits(adapted):
        with torch.no_grad():
            return adapted(torch.from_numpy(tokens).long()).logits.numpy()

    # Theirs in ours.
    kinds = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
    targets = kinds.get(family, ["q_proj", "v_proj", "down_proj"])
    asked = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        use_rslora=name == "rslora",
        use_dora=name == "dora",
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(theirs(), asked).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    _, pairs = read_adapter(tmp_path / "theirs", model, TABLES[family])
    found = our_logits(model, trees.merge(base, pairs), tokens)
    expected = their_logits(adapted)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - our_logits(model, base, tokens)).max() > 1e-2

    # Ours in theirs.
    ours = LoraConfig(rank=2, alpha=6.0, **OPTIONS[name])
    pairs = drawn(param_shapes(model), ours, seed=3)
    write_adapter(tmp_path / "ours", str(tmp_path / "base"), ours, pairs, model, TABLES[family])
    adapted = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    found = our_logits(model, trees.merge(base, pairs), tokens)
    np.testing.assert_allclose(their_logits(adapted), found, atol=1e-4)
