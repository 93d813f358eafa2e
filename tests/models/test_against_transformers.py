"""Every family against its implementation in Hugging Face Transformers, on random weights.

That needs the extra `peers` (`make test-all` installs it). For machines without it a few logits
of each family are stored here, of weights that a formula gives; with it, theirs must be the same.
"""

import dataclasses
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import FAMILIES, architecture
from jaxllm.models.transformer import Transformer, output_head, param_shapes
from jaxllm.ops.rotary import RopeScaling
from jaxllm.ops.vocabulary import logits

VOCAB, SEQ, WIDTH, HEADS, HEAD_DIM, LAYERS = 40, 24, 16, 4, 8, 7
LENGTHS = [11, 4, 9]  # documents of a packed row, the first longer than a window
SIZES = {
    "layers": LAYERS,
    "width": WIDTH,
    "heads": HEADS,
    "kv_heads": 2,
    "head_dim": HEAD_DIM,
    "mlp_width": 32,
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
    "max_position_embeddings": 64,
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
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "n_inner": 32},
        family="gpt2",
        kv_heads=HEADS,
        head_dim=0,
        max_positions=64,
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


def our_model(name):
    options = SIZES | {"family": family_of(name)} | CASES[name].our_options
    return architecture(ModelConfig(**options), VOCAB)


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


# Our path below a layer, and theirs; a kernel is their weight transposed.
LLAMA_LIKE = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp/router": "mlp.gate",
}
GEMMA_LIKE = LLAMA_LIKE | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
GPT2_LIKE = {
    "attention_norm": "ln_1",
    "attention/output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def of_latent_attention(weights, begin, module):
    """Their weight [out, in] of a part of ours; they rotate pairs (x[2i], x[2i + 1])."""
    rope, latent = LATENT["qk_rope_head_dim"], LATENT["kv_lora_rank"]
    evens_then_odds = np.r_[0:rope:2, 1:rope:2]
    if module in ("key", "value"):
        both = weights[f"{begin}.kv_b_proj.weight"].reshape(HEADS, -1, latent)
        part = np.split(both, [HEAD_DIM], axis=1)[("key", "value").index(module)]
        return part.reshape(-1, latent)
    name = {
        "query_down": "q_a_proj",
        "query_norm": "q_a_layernorm",
        "query": "q_b_proj" if f"{begin}.q_b_proj.weight" in weights else "q_proj",
        "latent_down": "kv_a_proj_with_mqa",
        "latent_norm": "kv_a_layernorm",
        "output": "o_proj",
    }[module]
    weight = weights[f"{begin}.{name}.weight"]
    if module == "query":
        by_head = weight.reshape(HEADS, HEAD_DIM + rope, -1)
        plain, rotated = np.split(by_head, [HEAD_DIM], axis=1)
        by_head = np.concatenate([plain, rotated[:, evens_then_odds]], axis=1)
        return by_head.reshape(weight.shape)
    if module == "latent_down":
        return np.concatenate([weight[:latent], weight[latent:][evens_then_odds]])
    return weight


def copied(model, their, family):
    """Our parameter tree with their weights."""
    weights = {name: value.numpy() for name, value in their.state_dict().items()}
    gpt2 = family == "gpt2"
    prefix, layers = ("transformer", "h") if gpt2 else ("model", "layers")
    names = GPT2_LIKE if gpt2 else GEMMA_LIKE if "gemma" in family else LLAMA_LIKE

    def of_layer(number, path):
        begin = f"{prefix}.{layers}.{number}"
        module, leaf = path.rsplit("/", 1)
        if "experts" in module:
            both = weights[f"{begin}.mlp.experts.gate_up_proj"]
            gate, up = np.split(both, 2, axis=1)
            down = weights[f"{begin}.mlp.experts.down_proj"]
            return {"gate": gate, "up": up, "down": down}[module.split("/")[-1]].swapaxes(1, 2)
        if gpt2 and module.split("/")[-1] in ("query", "key", "value"):
            part = ("query", "key", "value").index(module.split("/")[-1])
            fused = weights[f"{begin}.attn.c_attn.{'weight' if leaf == 'kernel' else 'bias'}"]
            return np.split(fused, 3, axis=-1)[part]
        latent = f"{begin}.self_attn.kv_a_proj_with_mqa.weight" in weights
        if latent and "attention/" in module:
            found = of_latent_attention(weights, f"{begin}.self_attn", module.split("/")[1])
            return found.T if leaf == "kernel" else found
        value = weights[f"{begin}.{names[module]}.{'bias' if leaf == 'bias' else 'weight'}"]
        return value.T if leaf == "kernel" and not gpt2 else value  # theirs of GPT-2 is [in, out]

    first = {}
    total = 0
    for index, stack in enumerate(model.stacks):
        first[index], total = total, total + stack.repeats * len(stack.unit)

    def leaf(path, shape):
        if path == "embedding":
            value = weights[f"{prefix}.{'wte' if gpt2 else 'embed_tokens'}.weight"]
        elif path == "position_embedding":
            value = weights["transformer.wpe.weight"]
        elif path == "output":
            value = weights["lm_head.weight"].T
        elif path.startswith("final_norm"):
            name = f"{prefix}.{'ln_f' if gpt2 else 'norm'}"
            value = weights[f"{name}.{'bias' if path.endswith('bias') else 'weight'}"]
        else:
            stack, layer, rest = path.split("/", 2)
            stack, layer = int(stack.split("_")[1]), int(layer.split("_")[1])
            unit, repeats = len(model.stacks[stack].unit), model.stacks[stack].repeats
            numbers = (first[stack] + unit * repeat + layer for repeat in range(repeats))
            value = np.stack([of_layer(number, rest) for number in numbers])
        assert value.shape == shape.shape, (path, value.shape, shape.shape)
        return jnp.asarray(value)

    return trees.map_with_paths(leaf, param_shapes(model))


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(their model, our logits of a batch)."""
    name = request.param
    their = their_model(name)
    model = our_model(name)
    params = copied(model, their, family_of(name))
    copied_size = sum(p.numel() for p in their.parameters())
    assert trees.size(params) == copied_size, "every weight of theirs has a place in ours"

    return their, jax.jit(partial(our_logits, model, params))


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
    their, our_logits_of = pair
    tokens = np.random.default_rng(0).integers(1, VOCAB, (3, SEQ)).astype(np.int32)
    lengths = np.array([SEQ, 13, 2])
    mask = (np.arange(SEQ) < lengths[:, None]).astype(np.int32)
    tokens = tokens * mask
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), tokens.shape)
    ours = np.asarray(our_logits_of(tokens, positions, mask))
    expected = their_logits(their, tokens.astype(np.int64), mask)
    assert np.abs(expected[mask > 0]).max() > 1  # they say something
    np.testing.assert_allclose(ours[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_packed_documents_have_the_logits_they_have_alone(pair, packed_rows):
    their, our_logits_of = pair
    row = packed_rows([LENGTHS], SEQ, VOCAB)
    ours = np.asarray(our_logits_of(row["tokens"], row["positions"], row["segment_ids"]))[0]
    begin = 0
    for length in LENGTHS:
        here = slice(begin, begin + length)
        alone = their_logits(their, row["tokens"][:, here].astype(np.int64))[0]
        np.testing.assert_allclose(ours[here], alone, atol=1e-4, rtol=1e-4)
        begin += length


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


def give(their, params, model, family):
    """Puts our weights into the places of theirs that `copied` takes them from."""
    import torch

    parameters, count = list(their.parameters()), 0
    with torch.no_grad():
        for parameter in parameters:  # each weight is its own number
            numbers = torch.arange(count, count + parameter.numel())
            parameter.copy_(numbers.reshape(parameter.shape))
            count += parameter.numel()
        values = np.zeros(count, np.float32)
        for place, ours in zip(
            jax.tree.leaves(copied(model, their, family)), jax.tree.leaves(params), strict=True
        ):
            values[np.asarray(place, int)] = ours
        for parameter in parameters:
            numbers = parameter.numpy().astype(int)
            parameter.copy_(torch.from_numpy(values[numbers]))


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
def test_the_known_logits_are_theirs(name):
    their, model = their_model(name), our_model(name)
    give(their, by_formula(model), model, family_of(name))
    theirs = their_logits(their, known_row().astype(np.int64))[0, -1, :4]
    np.testing.assert_allclose(theirs, KNOWN[name], atol=1e-4)
