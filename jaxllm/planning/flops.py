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
because MFU is about useful work. Where a part alone is trained, a matrix that is not has no
gradient of its own, and below the first stack with anything trained there is no backward pass;
thin pairs beside matrices (LoRA) are not counted themselves. The rule is that of Kaplan et al. 2020
(arXiv:2001.08361) and of PaLM, appendix B (arXiv:2204.02311), except that the latter counts
attention in full.
"""

import math
import re
from collections.abc import Collection

from jaxllm import trees
from jaxllm.models.config import (
    AttentionConfig,
    LatentAttentionConfig,
    MixtureConfig,
    TransformerConfig,
)
from jaxllm.models.transformer import param_shapes


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
    model: TransformerConfig,
    seq_len: int,
    predicted: float = 1.0,
    trained: Collection[str] | None = None,
) -> float:
    """FLOPs of forward and backward per token of rows of `seq_len` tokens.

    Of a mixture's experts those count that a token goes to.

    Args:
        model: what is trained; with a head in the place of its output matrix, that counts.
        seq_len: tokens of a row.
        predicted: share of the tokens that are predicted, for which the output matrix counts.
        trained: paths of the leaves that are trained, those of pairs among them; None: all are.
    """
    stacks = len(model.stacks)
    lowest = 0
    if trained is not None:  # where none is, gradients go back nowhere
        lowest = min((_place(path, stacks) for path in trained), default=stacks + 1)

    def of_inputs(at: int) -> bool:
        """Whether gradients go back through what stands at a place, to reach what is trained."""
        return lowest <= min(at, stacks)

    total = 0.0
    for path, leaf in trees.leaves_with_paths(param_shapes(model)):
        if path.endswith("/kernel"):
            used = forward_flops_per_token(_elements_used(model, path, leaf.shape), 0, seq_len)
            of_itself = trained is None or path in trained
            total += used * (1 + of_inputs(_place(path, stacks)) + of_itself)
    for at, stack in enumerate(model.stacks):
        width = stack.repeats * sum(_attention_width(layer.attention) for layer in stack.unit)
        attention = forward_flops_per_token(0, width, seq_len, model.causal)
        total += attention * (1 + 2 * of_inputs(at))
    if not model.head.outputs:
        output = forward_flops_per_token(predicted * model.vocab_size * model.width, 0, seq_len)
        name = "embedding" if model.tied else "output"
        total += output * (1 + of_inputs(stacks + 1) + (trained is None or name in trained))
    return total


def _place(path: str, stacks: int) -> int:
    """How far up a leaf is: its stack's number, `stacks` of the norm above them, one more of the
    output matrix and the head; the embeddings are as low as the first stack."""
    if path.startswith("stack_"):
        return int(path.split("/")[0].removeprefix("stack_"))
    if re.match("output|head/", path):
        return stacks + 1
    return 0 if re.match("(position_)?embedding", path) else stacks


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
