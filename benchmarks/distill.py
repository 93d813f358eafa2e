"""Seconds of a step of distillation on CPU, beside TRL's GKD and Tunix's distillation trainer.

    python benchmarks/distill.py [--turns=4] [--only=jaxllm,trl,tunix,jaxllm_kl]

Needs `pip install -e .[peers]`, `pip install trl` and `pip install google-tunix`. A step is one of
8 texts of 256 tokens, by the Llama of benchmarks/llama.py (8.5 M parameters, float32, AdamW,
gradients clipped) as the student, of a teacher that is twice as wide and is asked in the step;
processes of their own make them in turn, as in benchmarks/train.py. `jaxllm` and `trl` lose by the
Jensen-Shannon divergence of β = 0.5, `jaxllm_kl` and `tunix` by the forward KL, as that has no
other. At the end each process tells the most memory it has held.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from in_turn import Step, compare
from llama import HEADS, LAYERS, MLP, VOCAB, WIDTH, jaxllm_training, transformers_llama, tunix_llama

ROWS, LENGTH = 8, 256


def token_ids() -> np.ndarray:
    """[rows, length]."""
    return np.random.default_rng(0).integers(3, VOCAB, (ROWS, LENGTH))


def jaxllm_step(divergence: str) -> Step:
    """A step of ours."""
    import jax
    import jax.numpy as jnp

    from jaxllm.models.config import ModelConfig
    from jaxllm.models.families import architecture
    from jaxllm.models.transformer import SHARDING_RULES, init_params
    from jaxllm.objectives.distillation import TEACHER_TREE, distillation
    from jaxllm.ops.divergence import DivergenceConfig
    from jaxllm.training.step import init_state, jit_step, sparing_step, state_shapes

    teacher = architecture(
        ModelConfig(
            layers=LAYERS, width=2 * WIDTH, heads=2 * HEADS, mlp_width=2 * MLP, remat="none"
        ),
        VOCAB,
    )
    training = jaxllm_training(
        lambda model: distillation(model, DivergenceConfig(divergence), teacher)
    )
    ids, places = token_ids(), np.arange(LENGTH)
    rows = {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=1),
        "positions": places,
        "segment_ids": np.ones_like(places),
    }
    batch = {
        name: jnp.asarray(np.broadcast_to(array, ids.shape), jnp.int32)
        for name, array in rows.items()
    }
    batch["loss_weights"] = jnp.asarray(
        np.broadcast_to(places < LENGTH - 1, ids.shape), jnp.float32
    )
    mesh, optimizer = training.mesh, training.optimizer
    with jax.set_mesh(mesh):
        make = jax.jit(init_params, static_argnums=0)
        params = make(training.model, jax.random.key(0))
        frozen = {TEACHER_TREE: make(teacher, jax.random.key(1))}
        shapes = state_shapes(jax.eval_shape(lambda: params), optimizer, SHARDING_RULES, mesh)
        state = init_state(params, optimizer, shapes)
        step = sparing_step(jit_step(training.step, shapes, mesh))
    del params

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def trl_step() -> Step:
    """A step of TRL's, by its own `training_step` and optimizer."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    datasets.disable_progress_bars()
    names = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=names, pad_token="t0", eos_token="t1")
    config = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_length=LENGTH,
        learning_rate=1e-3,
        weight_decay=0.1,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        max_steps=1000,
        lmbda=0.0,
        beta=0.5,
        temperature=1.0,
    )
    options = {"max_position_embeddings": LENGTH, "use_cache": False}
    model, teacher = (transformers_llama(times, **options) for times in (1, 2))
    trainer = GKDTrainer(
        model=model.train(),
        teacher_model=teacher,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"messages": [[]]}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # its loop, which is not entered, sets it
    optimizer = trainer.create_optimizer()
    ids = torch.tensor(token_ids())
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def run() -> None:
        optimizer.zero_grad()
        trainer.training_step(model, dict(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def tunix_step() -> Step:
    """A step of Tunix's, by its own `_prepare_inputs` (which asks the teacher) and train step."""
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.distillation.distillation_trainer import (
        DistillationTrainer,
        TrainingConfig,
        TrainingInput,
    )
    from tunix.distillation.strategies.logit import LogitStrategy

    def forward(model: Any, input_tokens: Any, input_mask: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(LENGTH), input_tokens.shape)
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) & (input_mask[:, None] > 0)
        return model(input_tokens, places, None, causal)[0]

    def labels(input_tokens: Any, input_mask: Any) -> Any:
        del input_mask
        return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), VOCAB)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    trainer = DistillationTrainer(
        tunix_llama(),
        tunix_llama(times=2),
        LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0),
        optimizer,
        TrainingConfig(eval_every_n_steps=1000, max_steps=1000),
    )
    ids = token_ids()
    data = TrainingInput(input_tokens=ids, input_mask=np.ones_like(ids))
    step, _ = trainer.jit_train_and_eval_step()

    def run() -> None:
        jax.block_until_ready(step(trainer._prepare_inputs(data)))

    return run


STEPS: dict[str, Callable[[], Step]] = {
    "jaxllm": lambda: jaxllm_step("jsd"),
    "trl": trl_step,
    "tunix": tunix_step,
    "jaxllm_kl": lambda: jaxllm_step("forward_kl"),
}


if __name__ == "__main__":
    compare(__doc__.splitlines()[0], __file__, STEPS, f"{ROWS} x {LENGTH} tokens")
