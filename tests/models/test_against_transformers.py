"""Every family against its implementation in Hugging Face Transformers, on random weights.

That needs the extra `peers` (`make test-all` installs it). For machines without it a few logits
of each family are stored here, of weights that a formula gives; with it, theirs must be the same.
"""

import copy
import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxllm import trees
from jaxllm.conversion.configuration import read_config
from jaxllm.conversion.reading import read_params
from jaxllm.conversion.tables import TABLES
from jaxllm.conversion.weights import linear, norm
from jaxllm.conversion.writing import write_published
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Request, Sampling
from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.models.families import FAMILIES, architecture
from jaxllm.models.transformer import Transformer, output_head, param_shapes
from jaxllm.ops.rotary import RopeScaling
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer

VOCAB, SEQ, WIDTH, HEADS, HEAD_DIM, LAYERS = 40, 24, 16, 4, 8, 7
NEW, POSITIONS = 64, 96
LENGTHS = [11, 4, 9]  # documents of a packed row, the first longer than a window
SIZES = {
    "layers": LAYERS,
    "width": WIDTH,
    "heads": HEADS,
    "kv_heads": 2,
    "head_dim": HEAD_DIM,
    "mlp_width": 32,
    "max_positions": POSITIONS,
    "dtype": "float32",
    "attention": "xla",
}
THEIR_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT = {
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 6,
    "head_dim": 6,  # of what is rotated
    "v_head_dim": 5,
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": LAYERS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
OUR_LATENT = {"kv_heads": 0, "latent_width": 12, "rope_head_dim": 6, "value_head_dim": 5}
MILLION = {"rope_type": "default", "rope_theta": 1_000_000.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One of their models, and ours of the same architecture."""

    theirs: str
    their_options: dict
    our_options: dict


def case(theirs, their_options=None, **our_options):
    return Case(theirs, their_options or {}, our_options)


CASES = {
    "gpt2": case(
        "GPT2",
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "n_inner": 32,
        },
        family="gpt2",
        kv_heads=HEADS,
        head_dim=0,
    ),
    "llama": case("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": ROPE}),
    "llama, untied": case("Llama", {"rope_parameters": ROPE, "rms_norm_eps": 1e-5}, tied=False),
    "llama, linear": case(
        "Llama",
        {"rms_norm_eps": 1e-5, "rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
        rope_scaling=RopeScaling("linear", factor=4.0),
    ),
    "llama 3": case(
        "Llama",
        {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3},
        rope_scaling=RopeScaling("llama3", factor=8.0, original_length=16),
    ),
    "llama, yarn": case(
        "Llama",
        {"rms_norm_eps": 1e-5, "rope_parameters": YARN},
        rope_scaling=RopeScaling("yarn", factor=4.0, original_length=16),
    ),
    "llama, latent attention": case(
        "DeepseekV3", LATENT, **OUR_LATENT, query_latent_width=10, norm_eps=1e-6
    ),
    "llama, latent attention, queries not compressed": case(
        "DeepseekV3", LATENT | {"q_lora_rank": None}, **OUR_LATENT, norm_eps=1e-6
    ),
    "mistral": case(
        "Mistral",
        {"sliding_window": 5, "rms_norm_eps": 1e-5, "rope_parameters": ROPE},
        window=5,
    ),
    "qwen2": case("Qwen2", {"rope_parameters": MILLION}),
    "qwen3": case("Qwen3", {"rope_parameters": MILLION}),
    "gemma2": case(
        "Gemma2",
        {"sliding_window": 5, "query_pre_attn_scalar": 5, "rope_parameters": ROPE},
        window=5,
        attention_scale=5**-0.5,
    ),
    "gemma3": case(
        "Gemma3",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": HEAD_DIM,
            "rope_parameters": {
                "full_attention": MILLION | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": ROPE,
            },
        },
        window=5,
        rope_scaling=RopeScaling("linear", factor=8.0),
    ),
    "mixtral": case(
        "Mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rope_parameters": MILLION,
        },
        experts=4,
    ),
    "qwen3_moe": case(
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "rope_parameters": MILLION,
        },
        experts=4,
        experts_per_token=3,
    ),
}


def family_of(name):
    return CASES[name].our_options.get("family", name.split(",")[0].split(" ")[0])


def our_config(name):
    return ModelConfig(**SIZES | {"family": family_of(name)} | CASES[name].our_options)


def our_model(name):
    return architecture(our_config(name), VOCAB)


def their_model(name):
    """Random weights everywhere, norms and biases included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    chosen = CASES[name]
    stem = chosen.theirs + ("Text" if chosen.theirs == "Gemma3" else "")
    config_class = getattr(transformers, f"{stem}Config")
    tied = CASES[name].our_options.get("tied", True)
    config = config_class(**THEIR_SIZES | {"tie_word_embeddings": tied} | chosen.their_options)
    model = getattr(
        transformers, f"{chosen.theirs}{'LMHeadModel' if name == 'gpt2' else 'ForCausalLM'}"
    )(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            wide = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            wide = 0.5 if "embed" in path or "wte" in path else wide
            parameter.copy_(wide * torch.randn(parameter.shape, generator=generator))
            if (parameter.ndim == 1 and "norm" in path) or (".ln_" in path and "weight" in path):
                parameter.add_(1.0)
    return model.eval()


LATENT_PLACES = tuple(
    weight
    for ours, theirs in {
        "query_down": "q_a_proj",
        "query": "q_proj",
        "latent_down": "kv_a_proj_with_mqa",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
    }.items()
    for weight in linear(f"model.layers.{{layer}}.self_attn.{theirs}", f"attention/{ours}")
)
LATENT_NORMS = (
    *norm("model.layers.{layer}.self_attn.q_a_layernorm", "attention/query_norm"),
    *norm("model.layers.{layer}.self_attn.kv_a_layernorm", "attention/latent_norm"),
)
LATENT_TABLE = dataclasses.replace(
    TABLES["llama"],
    weights=(
        *(weight for weight in TABLES["llama"].weights if "self_attn" not in weight.theirs),
        *LATENT_PLACES,
        *LATENT_NORMS,
    ),
)


def with_plain_latent_attention(weights):
    """Their weights, the matrices of heads taken apart; they rotate pairs (x[2i], x[2i + 1])."""
    rope, latent = LATENT["qk_rope_head_dim"], LATENT["kv_lora_rank"]
    halves = np.r_[0:rope:2, 1:rope:2]
    found = {}
    for name, weight in weights.items():
        begin, _, module = name.removesuffix(".weight").rpartition(".")
        if module == "kv_b_proj":
            both = weight.reshape(HEADS, -1, latent)
            for part, values in zip("kv", np.split(both, [HEAD_DIM], axis=1), strict=True):
                found[f"{begin}.{part}_proj.weight"] = values.reshape(-1, latent)
        elif module in ("q_b_proj", "q_proj"):
            by_head = weight.reshape(HEADS, HEAD_DIM + rope, -1)
            plain, rotated = np.split(by_head, [HEAD_DIM], axis=1)
            by_head = np.concatenate([plain, rotated[:, halves]], axis=1)
            found[f"{begin}.q_proj.weight"] = by_head.reshape(weight.shape)
        elif module == "kv_a_proj_with_mqa":
            found[name] = np.concatenate([weight[:latent], weight[latent:][halves]])
        else:
            found[name] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in found.items()}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def small_tokenizer():
    """A tokenizer of as many words as the models here have rows."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCAB))]
    words = tokenizers.models.WordLevel(dict(zip(words, range(VOCAB), strict=True)), "<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    return HuggingFaceTokenizer(tokenizer.to_str())


class Pair(NamedTuple):
    name: str
    their: Any
    folder: Path
    """Where theirs is published."""
    model: TransformerConfig
    params: dict
    logits: Callable
    """Ours of tokens, positions and segments."""


@pytest.fixture(scope="module", params=CASES)
def pair(request, mesh, tmp_path_factory):
    """One of their models, and ours with its weights."""
    their, model = their_model(request.param), our_model(request.param)
    folder = tmp_path_factory.mktemp("published")
    table = None
    if "latent" in request.param:
        weights = {name: value.numpy() for name, value in their.state_dict().items()}
        if model.tied:
            del weights["lm_head.weight"]
        save_file(with_plain_latent_attention(weights), folder / "model.safetensors")
        table = LATENT_TABLE
    else:
        their.save_pretrained(folder)
    params = read_params(folder, model, mesh, table)
    assert trees.size(params) == sum(p.numel() for p in their.parameters())
    logits_of = jax.jit(partial(our_logits, model, params))
    return Pair(request.param, their, folder, model, params, logits_of)


def our_logits(model, params, tokens, positions, segment_ids):
    output = Transformer(model).apply({"params": params}, tokens, positions, segment_ids)
    return logits(output.hidden, output_head(model, params))


def their_logits(their, tokens, mask=None):
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return their(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def test_every_family_has_a_case():
    assert {family_of(name) for name in CASES} == set(FAMILIES)


@pytest.mark.slow
def test_padded_rows_have_their_logits(pair):
    tokens = np.random.default_rng(0).integers(1, VOCAB, (3, SEQ)).astype(np.int32)
    lengths = np.array([SEQ, 13, 2])
    mask = (np.arange(SEQ) < lengths[:, None]).astype(np.int32)
    tokens = tokens * mask
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), tokens.shape)
    ours = np.asarray(pair.logits(tokens, positions, mask))
    expected = their_logits(pair.their, tokens.astype(np.int64), mask)
    assert np.abs(expected[mask > 0]).max() > 1  # they say something
    np.testing.assert_allclose(ours[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_packed_documents_have_the_logits_they_have_alone(pair, packed_rows):
    row = packed_rows([LENGTHS], SEQ, VOCAB)
    ours = np.asarray(pair.logits(row["tokens"], row["positions"], row["segment_ids"]))[0]
    begin = 0
    for length in LENGTHS:
        here = slice(begin, begin + length)
        alone = their_logits(pair.their, row["tokens"][:, here].astype(np.int64))[0]
        np.testing.assert_allclose(ours[here], alone, atol=1e-4, rtol=1e-4)
        begin += length


@pytest.mark.slow
def test_greedy_text_is_that_of_their_generate(pair, small_tokenizer):
    """Prompts of uneven lengths at once, on both sides."""
    import torch

    draw = np.random.default_rng(3)
    prompts = [tuple(draw.integers(4, VOCAB, length).tolist()) for length in (3, 12, 7, 1, 9)]
    endless = copy.copy(small_tokenizer)
    endless.eos_id = VOCAB
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        engine = Engine(pair.model, pair.params, endless, context=POSITIONS, slots=4)
        ours = engine.complete([Request(prompt, Sampling(NEW, 0.0)) for prompt in prompts])
    longest = max(map(len, prompts))
    padded = np.array([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
    pair.their.generation_config.eos_token_id = None
    theirs = pair.their.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(padded > 0).long(),
        max_new_tokens=NEW,
        do_sample=False,
    )[:, longest:].tolist()
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        assert len(our.ids) == len(their) == NEW
        different = [step for step in range(NEW) if our.ids[step] != their[step]]
        if different:  # which counts only where their two best logits are apart
            text = np.array([[*prompt, *their[: different[0]]]])
            first, second = np.sort(their_logits(pair.their, text)[0, -1])[:-3:-1]
            assert first - second < 1e-4, (different[0], first, second)


def is_published_case(name):
    return "latent" not in name  # which is compared alone


@pytest.mark.slow
def test_their_configuration_is_read_as_ours(pair):
    if is_published_case(pair.name):
        read = dataclasses.replace(read_config(pair.folder), dtype="float32", attention="xla")
        assert read.dropout == read.embedding_dropout == (0.1 if "gpt2" in pair.name else 0)
        read = dataclasses.replace(read, dropout=0.0, embedding_dropout=0.0)
        assert architecture(read, VOCAB) == pair.model


def tensors_in(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_exported_weights_are_theirs_to_the_bit_and_load_in_silence(
    pair, small_tokenizer, tmp_path, caplog, recwarn
):
    if not is_published_case(pair.name):
        return
    import transformers

    export(pair, read_config(pair.folder), small_tokenizer, tmp_path)
    theirs, ours = tensors_in(pair.folder), tensors_in(tmp_path)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True)

    transformers.utils.logging.enable_propagation()
    recwarn.clear()
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert not list(recwarn)
    assert tokenizer.eos_token_id == again.generation_config.eos_token_id == small_tokenizer.eos_id
    row = known_row().astype(np.int64)
    np.testing.assert_array_equal(their_logits(again, row), their_logits(pair.their, row))


def export(pair, config, tokenizer, folder):
    write_published(
        folder,
        config,
        pair.model,
        pair.params,
        tokenizer,
        dtype="float32",
        max_shard_bytes=10**9,
    )


# Logits of tokens 0 to 3 after the row of `known_row`, with the weights of `by_formula`.
KNOWN = {
    "llama": [-0.4919, 4.8209, -0.4459, -4.6499],
    "gpt2": [2.0186, 1.3629, -0.7745, 3.2344],
    "mistral": [-1.7608, 3.5201, 0.9209, -3.6669],
    "qwen2": [-1.0778, 4.2713, -0.8969, -4.7094],
    "qwen3": [-0.9767, 4.7219, 0.1036, -4.5382],
    "gemma2": [6.8049, -4.3238, -5.2395, -4.7971],
    "gemma3": [-10.2662, 7.7710, 6.1235, -4.0571],
    "mixtral": [-1.5409, -2.8955, 1.9401, -3.8587],
    "qwen3_moe": [-2.4311, -2.4607, 2.3651, -5.0578],
}


def by_formula(model):
    """Weights that are the same on every machine, none of them near zero by design."""

    def leaf(path, shape):
        index = np.arange(np.prod(shape.shape, dtype=int), dtype=np.float64)
        waves = np.sin(0.1 * index**2 + zlib.crc32(path.encode()) % 1000).reshape(shape.shape)
        if path.endswith("kernel"):
            waves *= 1.5 * shape.shape[-2] ** -0.5
        elif path.endswith(("scale", "bias")):
            waves = 0.3 * waves + (path.endswith("scale") and 1.0)
        return jnp.asarray(waves, jnp.float32)

    return trees.map_with_paths(leaf, param_shapes(model))


def known_row():
    return (7 * np.arange(SEQ, dtype=np.int32)[None] ** 2) % VOCAB


def test_every_family_has_known_logits():
    assert set(KNOWN) == set(FAMILIES)


@pytest.mark.parametrize("name", KNOWN)
def test_known_weights_give_the_known_logits(name):
    model, row = our_model(name), known_row()
    positions = np.arange(SEQ, dtype=np.int32)[None]
    run = jax.jit(partial(our_logits, model))
    ours = run(by_formula(model), row, positions, np.ones_like(row))[0, -1, :4]
    np.testing.assert_allclose(ours, KNOWN[name], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_the_known_logits_are_theirs(name, small_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = our_model(name)
    config = dataclasses.replace(our_config(name), vocab_size=VOCAB)
    weights = {"dtype": "float32", "max_shard_bytes": 10**9}
    write_published(tmp_path, config, model, by_formula(model), small_tokenizer, **weights)
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    theirs = their_logits(their.eval(), known_row().astype(np.int64))[0, -1, :4]
    np.testing.assert_allclose(theirs, KNOWN[name], atol=1e-4)
