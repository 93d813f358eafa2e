"""FLOP counts against a model small enough to count by hand."""

import dataclasses
import re

from jaxllm import trees
from jaxllm.models.config import HeadConfig, ModelConfig, StackConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.planning.flops import forward_flops_per_token, model_training_flops_per_token

# Width 4 in 2 heads of 2, 1 key-value head, gated MLP of 8, vocabulary 10, 3 layers:
# per layer q 4·4, k 4·2, v 4·2, output 4·4, MLP 3·4·8 = 144; output matrix 4·10 = 40.
MATRIX_PARAMETERS = 3 * 144 + 40
LAYERS, ATTENTION_WIDTH, SEQ_LEN = 3, 4, 5


def test_forward_counts_each_product():
    matrices = 2 * (3 * 144 + 40)
    # Per layer, all 5·5 query-key pairs: 2 heads of 2 multiply-adds for the scores, the same for
    # the values; a causal mask leaves half.
    full_attention_of_a_sequence = 3 * (2 * 5 * 5 * 4 + 2 * 5 * 5 * 4)
    expected = matrices + full_attention_of_a_sequence / 2 / 5
    attention_width = LAYERS * ATTENTION_WIDTH
    assert forward_flops_per_token(MATRIX_PARAMETERS, attention_width, SEQ_LEN) == expected == 1064


def test_training_is_three_forward_passes():
    # The model above has 3 layers of width 4, 2 heads of which share keys, and 10 tokens.
    model = architecture(ModelConfig(layers=3, width=4, heads=2, kv_heads=1, mlp_width=8), 10)
    assert model_training_flops_per_token(model, SEQ_LEN) == 3 * 1064


def test_a_model_that_sees_both_ways_has_its_attention_counted_in_full(tiny_model):
    causal, both_ways = (tiny_model(causal=causal) for causal in (True, False))
    attention = model_training_flops_per_token(causal, 9) - model_training_flops_per_token(
        causal, 8
    )
    found = model_training_flops_per_token(both_ways, 8)
    assert found == model_training_flops_per_token(causal, 8) + 8 * attention


def test_the_output_matrix_counts_for_the_share_that_is_predicted(tiny_model):
    model = tiny_model()
    whole, quarter = (model_training_flops_per_token(model, 8, share) for share in (1.0, 0.25))
    assert whole - quarter == 0.75 * 6 * model.vocab_size * model.width


def test_attention_is_added_up_over_layers(tiny_model):
    layer = tiny_model(layers=1, positions="none")
    narrow = dataclasses.replace(layer.unrolled[0].attention, head_dim=2)
    stack = StackConfig(1, (dataclasses.replace(layer.unrolled[0], attention=narrow),))
    model = dataclasses.replace(layer, stacks=(*layer.stacks, stack))
    wider = model_training_flops_per_token(model, 9) - model_training_flops_per_token(model, 8)
    assert wider == 6 * 4 * (layer.unrolled[0].attention.head_dim + 2)


def test_of_a_mixture_only_the_experts_of_a_token_count(tiny_model):
    few, many = (
        tiny_model(family="mixtral", experts=experts, experts_per_token=2) for experts in (2, 8)
    )
    # Beside the router, which scores six experts more in each of three layers of width 16.
    router = 6 * 3 * 16 * 6
    difference = model_training_flops_per_token(many, 8) - model_training_flops_per_token(few, 8)
    assert difference == router


def _flops(model, *patterns):
    """With the leaves of the model trained whose paths match, and pairs of the names given."""
    trained = {path for path, _ in trees.leaves_with_paths(param_shapes(model))}
    found = {path for path in trained for pattern in patterns if re.fullmatch(pattern, path)}
    pairs = {name for name in patterns if "_lora_" in name}
    return model_training_flops_per_token(model, SEQ_LEN, trained=found | pairs)


def test_a_frozen_matrix_has_no_gradient_of_its_own(tiny_model):
    model = tiny_model()
    whole = model_training_flops_per_token(model, SEQ_LEN)
    assert _flops(model, ".*") == whole
    forward = whole / 3
    width = sum(layer.attention.heads * layer.attention.head_dim for layer in model.unrolled)
    attention = 2 * SEQ_LEN * width
    matrices = forward - attention
    pair = "stack_0/layer_0/mlp/up/kernel_lora_a"
    assert _flops(model, pair) == 2 * matrices + 3 * attention
    # The tied embedding is the output matrix, and a gradient that reaches it went all the way.
    tied = 2 * model.vocab_size * model.width
    assert _flops(model, "embedding") == 2 * matrices + tied + 3 * attention


def test_below_what_is_trained_there_is_no_backward_pass(tiny_model):
    model = tiny_model(layers=3, top_layers=1)
    alone = tiny_model(layers=1)
    forward = model_training_flops_per_token(model, SEQ_LEN) / 3
    output = 2 * model.vocab_size * model.width
    layer = model_training_flops_per_token(alone, SEQ_LEN) / 3 - output
    assert _flops(model, "stack_1/.*") == forward + 2 * layer + output


def test_gradients_go_back_as_far_as_something_is_trained(tiny_model):
    tied, untied = tiny_model(family="gpt2"), tiny_model(tied=False)
    output = 2 * tied.vocab_size * tied.width
    forward = model_training_flops_per_token(tied, SEQ_LEN) / 3
    assert _flops(tied, "final_norm/.*") == forward + output
    frozen = _flops(tied, "stack_0/layer_0/attention_norm/.*")
    assert _flops(tied, "position_embedding") == frozen > 1.9 * forward
    output = 2 * untied.vocab_size * untied.width
    forward = model_training_flops_per_token(untied, SEQ_LEN) / 3
    assert _flops(untied, "output") == forward + output
    frozen = _flops(untied, "stack_0/layer_0/attention_norm/.*")
    assert _flops(untied, "embedding") == frozen


def test_attention_of_every_layer_of_a_unit_counts(tiny_model):
    model = tiny_model(family="gemma2", layers=4)
    assert max(len(stack.unit) for stack in model.stacks) > 1
    width = sum(layer.attention.heads * layer.attention.head_dim for layer in model.unrolled)
    longer = model_training_flops_per_token(model, 9) - model_training_flops_per_token(model, 8)
    assert longer == 6 * width


def test_with_a_head_the_vocabulary_does_not_count(tiny_model):
    model, headed = tiny_model(), tiny_model(head=HeadConfig(3))
    vocabulary, head = 2 * model.vocab_size * model.width, 2 * 3 * model.width
    forward = model_training_flops_per_token(model, SEQ_LEN) / 3 - vocabulary + head
    assert model_training_flops_per_token(headed, SEQ_LEN) == 3 * forward
    assert _flops(headed, "head/.*") == forward + head
