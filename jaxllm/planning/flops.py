"""FLOPs of a decoder per token, counted one stated way, so that MFU figures compare.

A multiply-add counts as two. Per token, in the forward pass:

    matrices     2 · N
    attention    2 · layers · seq_len · attention_width, where it is causal

N is the number of elements of all matrices that a token is multiplied by: attention and MLP
projections and the output matrix, also when it is tied to the input embedding. The lookup in the
input embedding is no product and is left out, as are norms, biases, softmax and activations.
Where only a share of the tokens is predicted, the output matrix counts for that share.

Attention multiplies each query with each key, and each weight with each value: two products of
2 · seq_len · attention_width each, hence 4 · seq_len · attention_width per layer when every
position sees every other. A causal mask leaves half of that, which is what is counted, whether
or not a kernel skips the other half; a model that sees both ways is counted in full. Shorter
documents or windows are not deducted: the count belongs to the model's shape, not to a batch.

The backward pass costs twice the forward (gradients of inputs and of matrices), so training costs
three times: 6 · N + 6 · layers · seq_len · attention_width. Rematerialisation is not counted,
because MFU is about useful work. The rule is that of Kaplan et al. 2020 (arXiv:2001.08361) and of
PaLM, appendix B (arXiv:2204.02311), except that the latter counts attention in full.
"""

import math

from jaxllm import trees
from jaxllm.models.config import (
    AttentionConfig,
    LatentAttentionConfig,
    MixtureConfig,
    TransformerConfig,
)
from jaxllm.models.transformer import param_shapes

BACKWARD_PER_FORWARD = 2


def forward_flops_per_token(
    matrix_parameters: int | float, attention_width: int | float, seq_len: int, causal: bool = True
) -> float:
    """FLOPs of one forward pass per token of a sequence of `seq_len` tokens.

    Args:
        matrix_parameters: N of the module docstring: elements of all matrices, the output matrix
            included (also when tied), the input embedding not.
        attention_width: over all layers together, query heads times head size (where keys and
            values differ in it, the mean of both); fewer key-value heads change nothing.
        seq_len: length of the sequence, in tokens.
        causal: whether half of all pairs of tokens count, or all.
    """
    return 2.0 * matrix_parameters + (2.0 if causal else 4.0) * seq_len * attention_width


def model_training_flops_per_token(
    model: TransformerConfig, seq_len: int, predicted: float = 1.0
) -> float:
    """FLOPs of forward and backward per token of rows of `seq_len` tokens.

    Of a mixture's experts those count that a token goes to; `predicted` is the share of tokens
    that are predicted.
    """
    kernels = sum(
        _elements_used(model, path, leaf.shape)
        for path, leaf in trees.leaves_with_paths(param_shapes(model))
        if path.endswith("/kernel")
    )
    forward = forward_flops_per_token(
        kernels + predicted * model.vocab_size * model.width,
        sum(_attention_width(layer.attention) for layer in model.unrolled),
        seq_len,
        model.causal,
    )
    return (1 + BACKWARD_PER_FORWARD) * forward


def _attention_width(attention: AttentionConfig | LatentAttentionConfig) -> float:
    return attention.heads * (attention.head_dim + attention.value_dim) / 2


def _elements_used(model: TransformerConfig, path: str, shape: tuple[int, ...]) -> int:
    """The elements of a kernel that one token is multiplied by."""
    if "/experts/" not in path:
        return math.prod(shape)
    stack, layer = (int(name.split("_")[-1]) for name in path.split("/")[:2])
    mixture = model.stacks[stack].unit[layer].mlp
    assert isinstance(mixture, MixtureConfig)
    return math.prod(shape) // mixture.experts * mixture.per_token
