"""Published configurations as ours and back: defaults, both spellings, and what is refused."""

import dataclasses
import json

import pytest

from jaxllm.conversion.configuration import (
    check_is_model,
    is_published,
    read_config,
    written_config,
)
from jaxllm.conversion.tables import TABLES
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import FAMILIES, completed
from jaxllm.ops.rotary import RopeScaling


@pytest.fixture
def read(tmp_path):
    """Reads the fields of a `config.json`."""

    def make(model_type, **fields):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | fields))
        return read_config(tmp_path)

    return make


def test_every_family_has_a_table():
    assert set(TABLES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_again(read, config_of, family):
    config = dataclasses.replace(completed(config_of(family)), dtype="auto")
    again = read(**written_config(config))
    assert completed(again) == config


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_scaling": RopeScaling("linear", factor=4.0)}),
        ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, 16, 1.5, 5.0)}),
        ("qwen2", {"rope_scaling": RopeScaling("yarn", 4.0, 16, beta_fast=16.0)}),
        ("qwen3", {"rope_scaling": RopeScaling("yarn", 4.0, 16, attention_factor=1.5)}),
        ("gemma3", {"rope_scaling": RopeScaling("linear", 8.0), "rope_local_theta": 500.0}),
        ("llama", {"tied": False, "activation": "gelu_tanh", "rope_theta": 5e5, "norm_eps": 1e-3}),
        ("mistral", {"window": 0}),
        ("mixtral", {"pattern": "local", "window": 5}),
        ("qwen3_moe", {"pattern": "local", "window": 5, "normalised_experts": False}),
        ("qwen2", {"pattern": "local,global", "window": 5}),
        ("gemma2", {"pattern": "global", "window": -1, "attention_soft_cap": 0.0}),
        ("gpt2", {"tied": False, "dropout": 0.25, "mlp_width": 12}),
    ],
)
def test_what_a_family_can_vary_is_read_again(read, config_of, family, changes):
    config = dataclasses.replace(completed(config_of(family, **changes)), dtype="auto")
    again = completed(read(**written_config(config)))
    if family == "mistral":  # a window of 0 and no local layer are the same
        config = dataclasses.replace(config, pattern="global")
    assert again == config


# What Transformers' configuration classes take for a field that is missing.
DEFAULTS = {
    "llama": {"vocab_size": 32000, "kv_heads": 32, "head_dim": 128, "norm_eps": 1e-6},
    "gpt2": {"vocab_size": 50257, "width": 768, "mlp_width": 3072, "max_positions": 1024},
    "mistral": {"kv_heads": 8, "mlp_width": 14336, "pattern": "local", "window": 4096},
    "qwen2": {"rope_theta": 1e4, "pattern": "global", "head_dim": 128, "max_positions": 32768},
    "qwen3": {"rope_theta": 1e4, "head_dim": 128, "norm_eps": 1e-6},
    "gemma2": {"attention_soft_cap": 50.0, "logit_soft_cap": 30.0, "window": 4096},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_theta": 1e4, "window": 4096, "heads": 8},
    "mixtral": {"rope_theta": 1e6, "experts": 8, "experts_per_token": 2, "norm_eps": 1e-5},
    "qwen3_moe": {"experts": 128, "head_dim": 64, "mlp_width": 768, "normalised_experts": False},
}
TIED = {"gpt2", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_missing_field_means_what_it_means_there(read, model_type):
    config = completed(read(model_type))
    expected = DEFAULTS[model_type] | {"tied": model_type in TIED}
    assert {name: getattr(config, name) for name in expected} == expected
    family = {"gemma3_text": "gemma3"}.get(model_type, model_type)
    if family != "qwen2":  # there a window is off by default
        assert config.pattern == ",".join(FAMILIES[family].pattern)


def test_rotary_positions_are_read_in_both_spellings(read):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}
    old = read("llama", rope_theta=5e5, rope_scaling=scaling | {"type": "llama3"})
    new = read("llama", rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 500000})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling("llama3", factor=8.0, original_length=16)
    each = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read("gemma3_text", rope_scaling=linear, rope_local_base_freq=20000)
    assert old == read("gemma3_text", rope_parameters=each)
    assert (old.rope_local_theta, old.rope_scaling.factor) == (2e4, 8.0)


def test_the_original_length_is_that_of_the_model_where_it_is_missing(read):
    yarn = {"type": "yarn", "factor": 4.0}
    scaling = read("qwen2", max_position_embeddings=64, rope_scaling=yarn).rope_scaling
    assert scaling == RopeScaling("yarn", factor=4.0, original_length=64)


def test_scaling_by_one_is_none(read):
    assert read("llama", rope_scaling={"type": "linear", "factor": 1.0}).rope_scaling.kind == "none"


def test_windows_are_read_layer_by_layer(read):
    window = {"num_hidden_layers": 4, "sliding_window": 8, "use_sliding_window": True}
    assert read("qwen2", **window | {"max_window_layers": 4}).pattern == "global"
    assert read("qwen2", **window | {"max_window_layers": 0}).pattern == "local"
    assert (
        read("qwen2", **window | {"max_window_layers": 3}).pattern == "global,global,global,local"
    )
    assert (
        read("qwen2", **window | {"max_window_layers": 0, "use_sliding_window": False}).window < 0
    )
    kinds = ["sliding_attention", "full_attention"] * 2
    assert read("qwen3", **window, layer_types=kinds).pattern == "local,global"
    assert read("qwen3", **window, layer_types=kinds).window == 8
    assert (
        read("gemma3_text", num_hidden_layers=4, sliding_window_pattern=2).pattern == "local,global"
    )


def test_the_text_of_a_model_that_sees_is_read(read):
    inner = {"model_type": "gemma3_text", "hidden_size": 16, "num_attention_heads": 4}
    config = read("gemma3", text_config=inner, vision_config={"hidden_size": 32})
    assert (config.family, config.width, config.heads, config.kv_heads) == ("gemma3", 16, 4, 4)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bert", {}, "model_type: 'bert' is no family that weights are read of; known are llama"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; known are silu"),
        ("llama", {"attention_bias": True}, "attention_bias: True is not supported; only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True"),
        ("llama", {"hidden_size": "16"}, "hidden_size: must be a positive integer, and is '16'"),
        ("llama", {"hidden_size": None}, "hidden_size: must be a positive integer, and is None"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: must be a positive number, and is 0"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
        ("llama", {"num_key_value_heads": 5}, r"num_key_value_heads \(our kv_heads\): 5 does not"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("llama", {"auto_map": {"AutoModel": "own.Model"}}, "auto_map: the model is defined by"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "factor: must be a positive number, and is '2'",
        ),
        ("llama", {"rope_theta": 0}, "rope_theta: must be a positive number"),
        (
            "qwen2",
            {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
            r"rope_scaling.mrope_section: \[1, 2\] is not supported",
        ),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type: 'mrope'"),
        (
            "qwen3",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            "rope_scaling.truncate: False",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: must say"),
        ("qwen2", {"is_causal": False}, "is_causal: False is not supported; only True is"),
        (
            "qwen3",
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "use_sliding_window: is off",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window: must be a positive integer, and is 0"),
        ("gpt2", {"activation_function": "gelu_10"}, "activation_function: 'gelu_10'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters: must tell of each kind of layer",
        ),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 32},
            r"layer_types: \['full_attention', .*, \.\.\.\] is not .* layer is sliding_attention",
        ),
        ("mistral", {"layer_types": "sliding_attention"}, "layer_types: 'sliding_attention'"),
        ("gemma3", {"text_config": []}, r"text_config: must be an object, and is \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]"),
    ],
)
def test_what_no_model_of_ours_does_is_refused_by_name(read, model_type, fields, message):
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read(model_type, **fields)


INF, NAN = float("inf"), float("nan")
TWO = {"num_hidden_layers": 2}
WINDOWS = {"use_sliding_window": True}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act: \['silu'\] is not supported; known"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling: must be an object, and is 'yarn'"),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling: must be an object, and is \[1\]"),
        ("llama", {"rope_scaling": 5}, "rope_scaling: must be an object, and is 5"),
        ("llama", {"rope_scaling": {"type": ["x"]}}, r"rope_scaling\.rope_type: \['x'\] is not"),
        ("llama", {"rope_parameters": "x"}, "rope_parameters: must be an object, and is 'x'"),
        ("llama", {"rope_parameters": {"rope_theta": NAN}}, r"rope_parameters\.rope_theta: .* nan"),
        ("llama", {"rope_scaling": YARN | {"factor": INF}}, r"rope_scaling\.factor: .* is inf"),
        (
            "llama",
            {"rope_scaling": YARN | {"original_max_position_embeddings": INF}},
            r"rope_scaling\.original_max_position_embeddings: must be a positive integer, .* inf",
        ),
        ("llama", {"rope_theta": NAN}, "rope_theta: must be a positive number, and is nan"),
        ("llama", {"rope_theta": True}, "rope_theta: must be a positive number, and is True"),
        ("llama", {"rope_theta": 10**400}, "rope_theta: must be a positive number, and is 1000"),
        ("llama", {"rms_norm_eps": INF}, "rms_norm_eps: must be a positive number, and is inf"),
        ("llama", {"vocab_size": 10**15}, "vocab_size: must be at most 1,000,000,000, and is 1"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers: must be at most 1,024"),
        ("qwen2", TWO | {"layer_types": 5}, "layer_types: must say .* of 2 layers, and is 5"),
        ("qwen2", TWO | {"layer_types": [[], []]}, r"layer_types: must say .* is \[\[\], \[\]\]"),
        ("qwen2", WINDOWS | {"max_window_layers": "x"}, "max_window_layers: must be an int.* 'x'"),
        ("qwen2", WINDOWS | {"max_window_layers": None}, "max_window_layers: .* is None"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window: must be true or false"),
        ("qwen3_moe", {"use_sliding_window": "false"}, "use_sliding_window: must be true or false"),
        ("gemma2", {"sliding_window": "8"}, "sliding_window: must be a positive integer"),
        ("gemma2", {"query_pre_attn_scalar": NAN}, "query_pre_attn_scalar: must be a positive"),
        (
            "gemma3_text",
            {"sliding_window_pattern": 0},
            "sliding_window_pattern: must be a positive",
        ),
        ("gemma3_text", {"sliding_window_pattern": "6"}, "sliding_window_pattern: .* is '6'"),
        ("gemma3_text", {"rope_parameters": 5}, "rope_parameters: must be an object, and is 5"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 5}},
            r"rope_parameters\.full_attention: must be an object, and is 5",
        ),
        ("gemma3_text", {"rope_scaling": "x"}, "rope_scaling: must be an object, and is 'x'"),
        ("gpt2", {"resid_pdrop": -0.5}, "resid_pdrop: must be a number, not negative, and is -0.5"),
        # Each field is right, and they do not go together.
        ("gpt2", {"n_head": 5}, r"n_head \(our heads\): 5 does not divide width 768"),
        ("llama", {"head_dim": 15}, "head_dim: must be even"),
        (
            "mixtral",
            {"num_local_experts": 1},
            r"num_experts_per_tok \(our experts_per_token\): 2 is more than the 1 experts\.$",
        ),
    ],
)
def test_a_field_of_another_type_is_told_with_its_value(read, model_type, fields, message):
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        read(model_type, **fields)


def test_windows_of_all_layers_may_be_listed_too(read):
    full, window = ["full_attention"] * 2, ["sliding_attention"] * 2
    assert read("mistral", **TWO, layer_types=window).pattern == "local"
    assert read("mistral", **TWO, layer_types=full, sliding_window=None).pattern == "global"
    assert read("qwen3_moe", **TWO, layer_types=full).pattern == "global"


def test_only_a_model_that_sees_has_a_part_that_is_text(read):
    assert read("llama", text_config={"hidden_size": 64}).width == 4096
    assert read("llama", text_config=[]).width == 4096


def test_a_model_of_many_layers_that_differ_is_read_at_once(read):
    kinds = ["sliding_attention"] * 1023 + ["full_attention"]
    config = read("gemma2", num_hidden_layers=1024, layer_types=kinds)
    assert config.pattern == ",".join(["local"] * 1023 + ["global"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model_type":', r"config\.json: cannot be read \(Expecting value"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', r"config\.json: cannot be read \(.*BOM"),
        (b'{"model_type": "\xff"}', r"config\.json: cannot be read \('utf-8' codec"),
        (b"[" * 200_000, r"config\.json: cannot be read \(it is nested too deeply\)"),
        (b'["model_type"]', r"config\.json: cannot be read \(it is no object\)"),
        (b'{"hidden_size": 8}', r"config\.json: is neither that of a run, .* nor that of"),
        (None, r"is no run directory \(it has no config\.json\), and no folder of published"),
    ],
    ids=["cut", "bom", "latin", "deep", "list", "other", "missing"],
)
def test_a_folder_of_no_model_is_told_why(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert not is_published(tmp_path)
    with pytest.raises(UserError, match=reason):
        check_is_model(tmp_path)


def test_a_name_is_no_folder():
    with pytest.raises(UserError, match=r"^org/name: is no run .* Hugging Face .*by the name of a"):
        check_is_model("org/name")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"positions": "none"}, "config.model.positions: is 'none'"),
        ("llama", {"causal": False}, "config.model.causal: is False"),
        ("llama", {"latent_width": 4, "rope_head_dim": 2, "kv_heads": 0}, "latent_width: is 4"),
        ("llama", {"experts": 2}, "config.model.experts: is 2"),
        ("llama", {"attention_soft_cap": 5.0}, "config.model.attention_soft_cap: is 5.0"),
        ("llama", {"attention_scale": 0.1}, "config.model.attention_scale: is 0.1"),
        ("llama", {"pattern": "local", "window": 4}, "config.model.pattern: is 'local'"),
        ("mistral", {"pattern": "local,global"}, "pattern: is 'local,global', of layers that"),
        ("mixtral", {"normalised_experts": False}, "normalised_experts: is False"),
        ("gpt2", {"kv_heads": 2}, "config.model.kv_heads: is 2"),
        ("gpt2", {"head_dim": 8}, "config.model.head_dim: is 8"),
        ("gpt2", {"positions": "rotary"}, "config.model.positions: is 'rotary'"),
        ("gemma2", {"attention_scale": 0.3}, "attention_scale: is 0.3, which is 1/√n of no whole"),
        ("gemma3", {"window": 0, "pattern": ""}, "config.model.window: is 0"),
    ],
)
def test_a_model_that_no_published_one_is_like_is_refused_by_name(
    config_of, family, changes, message
):
    with pytest.raises(UserError, match=f"{message}.*cannot be exported"):
        written_config(config_of(family, **changes))


def test_how_a_model_is_computed_or_trained_makes_no_difference(config_of):
    trained = {"load_balance_loss": 0.5, "dropout": 0.1, "remat": "full", "param_dtype": "bfloat16"}
    assert written_config(config_of("mixtral", **trained)) == written_config(config_of("mixtral"))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"config": {}}', '{"hidden_size": 4}'])
def test_only_a_configuration_that_names_its_kind_is_a_published_one(tmp_path, text):
    assert not is_published(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert not is_published(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert is_published(tmp_path)
    assert read_config(tmp_path) == read_config(str(tmp_path))
    assert isinstance(read_config(tmp_path), ModelConfig)
