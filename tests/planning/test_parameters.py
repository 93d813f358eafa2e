"""Parameters by the conventions of scaling laws."""

import pytest

from jaxllm import trees
from jaxllm.models.transformer import param_shapes
from jaxllm.planning.parameters import embedding_parameters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"family": "llama", "tied": True}, 50 * 16),
        ({"family": "llama", "tied": False}, 2 * 50 * 16),
        ({"family": "gpt2", "tied": True, "max_positions": 12, "kv_heads": 0}, (50 + 12) * 16),
    ],
)
def test_embeddings_of_tokens_and_positions_and_the_output(tiny_model, options, expected):
    shapes = param_shapes(tiny_model(50, **options))
    assert embedding_parameters(shapes) == expected < trees.size(shapes)
