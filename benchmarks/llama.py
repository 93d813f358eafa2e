"""The model that the benchmarks share: a Llama of 8.5 M parameters, here as Transformers has it."""

import os
from typing import Any

WIDTH, LAYERS, HEADS, MLP, VOCAB = 256, 8, 4, 704, 8192


def transformers_llama(**options: Any):
    """The model in Transformers, tied, with random weights, on as many threads as there are cores.

    `options` are fields of its configuration.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **options,
    )
    return LlamaForCausalLM(config)
