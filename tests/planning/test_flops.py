"""FLOP counts against a model small enough to count by hand."""

from jaxllm.planning.flops import (
    forward_flops_per_token,
    model_training_flops_per_token,
    training_flops_per_token,
)

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
    assert (
        forward_flops_per_token(MATRIX_PARAMETERS, LAYERS, ATTENTION_WIDTH, SEQ_LEN)
        == expected
        == 1064
    )


def test_training_is_six_per_parameter_and_token():
    assert training_flops_per_token(1000, 0, 64, 128) == 6000
    attention = training_flops_per_token(0, LAYERS, ATTENTION_WIDTH, SEQ_LEN)
    assert attention == 12 * LAYERS * SEQ_LEN * ATTENTION_WIDTH / 2


def test_of_a_mixture_only_the_experts_of_a_token_count(tiny_model):
    few, many = (
        tiny_model(family="mixtral", experts=experts, experts_per_token=2) for experts in (2, 8)
    )
    # Beside the router, which scores six experts more in each of three layers of width 16.
    router = training_flops_per_token(3 * 16 * 6, 0, 0, 0)
    difference = model_training_flops_per_token(many, 8) - model_training_flops_per_token(few, 8)
    assert difference == router
