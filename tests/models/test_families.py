"""The model's configuration: what it becomes, and what it refuses."""

import pytest

from jaxllm import trees
from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import FAMILIES, architecture
from jaxllm.models.transformer import param_shapes


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
        ({"dtype": "float64"}, r"config\.model\.dtype: must be one of .*'float64'"),
        ({"remat": "some"}, r"config\.model\.remat: must be one of none, dots, full"),
        ({"family": "gpt9"}, r"config\.model\.family: 'gpt9' is unknown; .* llama"),
        ({"attention": "flash9"}, r"config\.model\.attention: 'flash9' is unknown; .* xla"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        architecture(from_dict(ModelConfig, changes, "model"), 10)
