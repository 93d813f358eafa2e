"""The model that the benchmarks share: a Llama of 8.5 M parameters, ours and
that of Transformers and Tunix."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

WIDTH, LAYERS, HEADS, MLP, VOCAB = 256, 8, 4, 704, 8192


class Training(NamedTuple):
    """What a step of ours is compiled from."""

    model: Any
    optimizer: Any
    mesh: Any
    step: Any
    """Of `make_train_step`."""


def jaxllm_training(objective_of: Callable[[Any], Any] | None = None) -> Training:
    """Our model with AdamW on one device, in a process set up as for the stage `pretrain`.

    `objective_of` makes the objective of the model; None: next-token prediction.
    """
    import jax

    from jaxllm.host_memory import keep_freed_memory_on_cpu
    from jaxllm.models.config import ModelConfig
    from jaxllm.models.families import architecture
    from jaxllm.objectives.cross_entropy import CrossEntropyConfig
    from jaxllm.objectives.next_token import next_token
    from jaxllm.sharding.mesh import MeshConfig, make_mesh
    from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
    from jaxllm.training.step import make_train_step

    keep_freed_memory_on_cpu()
    model = architecture(ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=MLP), VOCAB)
    optimizer = make_optimizer(OptimizerConfig())
    step = make_train_step(
        objective_of(model) if objective_of else next_token(model, CrossEntropyConfig()),
        optimizer,
        learning_rate_schedule(OptimizerConfig(), steps=1000),
        micro_batches=1,
        seed=0,
    )
    return Training(model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), step)


def transformers_llama(times: int = 1, **options: Any):
    """The model in Transformers, tied, with random weights, on as many threads as there are cores.

    `times` as wide; `options` are fields of its configuration.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=times * WIDTH,
        intermediate_size=times * MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=times * HEADS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **options,
    )
    return LlamaForCausalLM(config)


def tunix_llama(kind: Any = None, tied: bool = True, times: int = 1) -> Any:
    """The model in Tunix, `times` as wide."""
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig

    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=times * WIDTH,
        hidden_dim=times * MLP,
        num_heads=times * HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=times * HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tied,
    )
    return (kind or Llama3)(config, rngs=nnx.Rngs(0))
