"""The model's configuration: what it becomes, and what it refuses."""

import re
from pathlib import Path

import pytest

from jaxllm import trees
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models import families
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import FAMILIES, architecture, completed
from jaxllm.models.transformer import check_length, param_shapes


def test_llama_counts_the_parameters_of_the_published_8b():
    config = ModelConfig(layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336, tied=False)
    model = architecture(config, 128_256)
    assert model.layers == 32
    assert trees.size(param_shapes(model)) == 8_030_261_248


def test_zeros_are_chosen_by_the_other_fields():
    layer = architecture(ModelConfig(width=96, heads=6), 10).stacks[0].unit[0]
    assert (layer.attention.kv_heads, layer.attention.head_dim) == (6, 16)
    assert layer.mlp.width == 256  # 8/3 · 96
    layer = architecture(ModelConfig(width=100, heads=2, head_dim=6, kv_heads=1), 10)
    assert layer.stacks[0].unit[0].attention.head_dim == 6
    assert layer.stacks[0].unit[0].mlp.width == 288  # 266.7, rounded up


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completed_configuration_is_the_same_model_and_leaves_nothing_to_complete(family):
    for changes in ({}, {"width": 96, "heads": 6, "experts": 0 if family == "gpt2" else 8}):
        config = ModelConfig(family=family, **changes)
        whole = completed(config)
        assert completed(whole) == whole
        model = architecture(config, 10)
        (first, *_) = model.unrolled
        assert (whole.kv_heads, whole.head_dim) == (
            first.attention.kv_heads,
            first.attention.head_dim,
        )
        assert whole.mlp_width == first.mlp.width
        assert whole.attention_scale == first.attention.scale
        assert whole.norm_eps == first.norm.eps
        assert whole.window == max(layer.attention.window for layer in model.unrolled)


def test_an_embedding_may_have_more_rows_than_there_are_tokens_and_not_fewer():
    assert architecture(ModelConfig(), 10).vocab_size == 10
    assert architecture(ModelConfig(vocab_size=12), 10).vocab_size == 12
    with pytest.raises(UserError, match=r"vocab_size: 9 rows .* fewer than the 10 tokens"):
        architecture(ModelConfig(vocab_size=9), 10)


@pytest.mark.parametrize(
    ("options", "positions", "learned"),
    [
        ({}, 0, 0),
        ({"max_positions": 8}, 8, 0),
        ({"positions": "learned"}, 1024, 1024),
        ({"positions": "learned", "max_positions": 8}, 8, 8),
        ({"family": "gpt2"}, 1024, 1024),
        ({"positions": "none", "max_positions": 8}, 8, 0),
    ],
)
def test_longer_rows_than_a_model_is_made_for_are_refused(options, positions, learned):
    model = architecture(ModelConfig(**options), 10)
    assert (model.max_positions, model.learned_positions) == (positions, learned)
    check_length(model, positions or 10**9, "field")
    if positions:
        with pytest.raises(UserError, match=rf"field: .* more than the {positions:,} positions"):
            check_length(model, positions + 1, "field")


# What the models' cards and configurations say: sizes, and the parameters in all.
PUBLISHED = {
    "gpt2": (
        {"layers": 12, "width": 768, "heads": 12, "max_positions": 1024},
        50_257,
        124_439_808,
    ),
    "mistral": (
        {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}
        | {"tied": False},
        32_000,
        7_241_732_096,
    ),
    "qwen2": (
        {"layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864},
        151_936,
        494_032_768,
    ),
    "qwen3": (
        {"layers": 28, "width": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128}
        | {"mlp_width": 3072},
        151_936,
        596_049_920,
    ),
    "gemma2": (
        {"layers": 26, "width": 2304, "heads": 8, "kv_heads": 4, "head_dim": 256}
        | {"mlp_width": 9216},
        256_000,
        2_614_341_888,
    ),
    "gemma3": (
        {"layers": 26, "width": 1152, "heads": 4, "kv_heads": 1, "head_dim": 256}
        | {"mlp_width": 6912},
        262_144,
        999_885_952,
    ),
    "mixtral": (
        {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}
        | {"tied": False},
        32_000,
        46_702_792_704,
    ),
    "qwen3_moe": (
        {"layers": 48, "width": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128}
        | {"mlp_width": 768, "tied": False},
        151_936,
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_family_has_the_parameters_of_a_published_model(family):
    options, vocab_size, parameters = PUBLISHED[family]
    model = architecture(ModelConfig(family=family, **options), vocab_size)
    assert model.layers == options["layers"]
    assert trees.size(param_shapes(model)) == parameters


def test_a_pattern_repeats_and_its_rest_is_a_stack_of_its_own():
    model = architecture(ModelConfig(family="gemma3", layers=14), 10)
    assert [(stack.repeats, len(stack.unit)) for stack in model.stacks] == [(2, 6), (1, 2)]
    windows = [layer.attention.window for layer in model.unrolled]
    assert windows == ([1024] * 5 + [0]) * 2 + [1024] * 2
    thetas = {layer.attention.window: layer.attention.rotary.theta for layer in model.unrolled}
    assert thetas == {1024: 10_000.0, 0: 1_000_000.0}


def test_fields_change_what_a_family_brings():
    changed = ModelConfig(
        family="gemma2", pattern="global,local", window=7, attention_soft_cap=0.0, norm_eps=0.5
    )
    model = architecture(changed, 10)
    assert [layer.attention.window for layer in model.unrolled] == [0, 7, 0, 7]
    assert {layer.attention.soft_cap for layer in model.unrolled} == {0.0}
    assert model.logit_soft_cap == 30.0  # not asked for
    assert model.norm.eps == 0.5
    llama = architecture(ModelConfig(pattern="local,global", window=16, experts=4), 10)
    assert [layer.attention.window for layer in llama.unrolled] == [16, 0, 16, 0]
    assert llama.unrolled[0].mlp.per_token == 2
    assert llama.unrolled[0].mlp.normalise
    other = ModelConfig(experts=4, normalised_experts=False, activation="gelu")
    mlp = architecture(other, 10).unrolled[0].mlp
    assert (mlp.normalise, mlp.activation) == (False, "gelu")
    dense = architecture(ModelConfig(family="gemma2", activation="silu"), 10)
    assert {layer.mlp.activation for layer in dense.unrolled} == {"silu"}
    # A family's window may be taken away.
    mistral = architecture(ModelConfig(family="mistral", window=0), 10)
    assert {layer.attention.window for layer in mistral.unrolled} == {0}


def test_no_module_of_the_model_names_a_family():
    folder = Path(families.__file__).parent
    for path in folder.glob("*.py"):
        if path.name not in ("families.py", "config.py"):
            words = set(re.findall(r'"(\w+)"', path.read_text()))
            assert not words & set(FAMILIES), path.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_a_parameter_unless_tied(family, tied, tiny_model):
    shapes = param_shapes(tiny_model(family=family, tied=tied))
    assert ("output" in shapes) is not tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, r"config\.model\.layers: must be at least 1"),
        ({"kv_heads": -1}, r"config\.model\.kv_heads: must not be negative"),
        ({"heads": 3}, r"config\.model\.heads: 3 does not divide width 256"),
        ({"heads": 4, "kv_heads": 3}, r"config\.model\.kv_heads: 3 does not divide heads 4"),
        ({"head_dim": 5}, r"config\.model\.head_dim: must be even"),
        ({"window": -2}, r"config\.model\.window: must not be negative, but for -1"),
        ({"pattern": "local,globe"}, r"config\.model\.pattern: is a list of `local` and `global`"),
        ({"dropout": 1.0}, r"config\.model\.dropout: must be less than 1"),
        ({"positions": "alibi"}, r"positions: must be one of rotary, learned, sinusoidal, none"),
        ({"experts": 4, "experts_per_token": 5}, r"experts_per_token: 5 is more than the 4 exp"),
        ({"family": "gpt2", "experts": 4}, r"config\.model\.experts: the MLP of 'gpt2' is not"),
        ({"rope_scaling": {"kind": "ntk"}}, r"config\.model\.rope_scaling\.kind: must be one of"),
        ({"dtype": "float64"}, r"config\.model\.dtype: must be one of .*'float64'"),
        ({"remat": "some"}, r"config\.model\.remat: must be one of none, dots, full"),
        ({"family": "gpt9"}, r"config\.model\.family: 'gpt9' is unknown; .* llama"),
        ({"attention": "flash9"}, r"config\.model\.attention: 'flash9' is unknown; .* xla"),
        ({"activation": "relu9"}, r"config\.model\.activation: 'relu9' is unknown; .* silu, gelu"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        architecture(from_dict(ModelConfig, changes, "model"), 10)


def test_a_backend_that_cannot_compute_in_the_dtype_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(
        UserError, match=r"config\.model\.attention: cudnn cannot compute in float32"
    ):
        architecture(ModelConfig(attention="cudnn", dtype="float32"), 10)
    architecture(ModelConfig(attention="cudnn"), 10)  # `auto` is bfloat16 there


SCALING = {"kind": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"window": 128}, "window", "no layer of the pattern is local"),
        ({"pattern": "local,global"}, "pattern", "the window is 0"),
        ({"family": "gemma2", "pattern": "local", "window": 0}, "pattern", "the window is 0"),
        ({"family": "gpt2", "rope_theta": 5e5}, "rope_theta", "positions are learned, not rotary"),
        ({"positions": "none", "rope_scaling": SCALING}, "rope_scaling", "positions are none"),
        ({"rope_local_theta": 1e4}, "rope_local_theta", "no layer of the pattern is local"),
        (
            {"positions": "sinusoidal", "rope_local_theta": 1e4, "pattern": "local", "window": 8},
            "rope_local_theta",
            "positions are sinusoidal",
        ),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor", "the kind of scaling is none"),
        ({"rope_scaling": {"beta_fast": 8.0}}, "rope_scaling.beta_fast", "scaling is none"),
        (
            {"rope_scaling": SCALING | {"beta_fast": 8.0}},
            "rope_scaling.beta_fast",
            "the kind of scaling is llama3",
        ),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling.factor", "is 1, and linear would"),
        ({"experts_per_token": 2}, "experts_per_token", "there are no experts"),
        ({"normalised_experts": False}, "normalised_experts", "there are no experts"),
        ({"load_balance_loss": 0.0}, "load_balance_loss", "there are no experts"),
        ({"router_z_loss": 0.1}, "router_z_loss", "there are no experts"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(changes, field, reason):
    with pytest.raises(UserError, match=rf"^config\.model\.{re.escape(field)}: .*{reason}"):
        architecture(from_dict(ModelConfig, changes, "model"), 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "local,global", "window": 8, "rope_local_theta": 1e4, "rope_scaling": SCALING},
        {"rope_scaling": {"kind": "yarn", "attention_factor": 1.5}},
        {"experts": 4, "experts_per_token": 1, "router_z_loss": 0.0},
    ],
)
def test_the_same_fields_are_taken_where_they_change_something(changes):
    architecture(from_dict(ModelConfig, changes, "model"), 10)
