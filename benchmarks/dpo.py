"""Seconds of a step of direct preference optimisation on CPU, beside TRL's and Tunix's DPOTrainer.

    python benchmarks/dpo.py [--turns=4] [--only=jaxllm_live,trl,tunix,jaxllm]

Needs `pip install -e .[peers]`, `pip install trl` and `pip install google-tunix`. A step is one of
16 pairs of 2 x 256 tokens, of which the first 64 are the prompt, of the Llama of
benchmarks/llama.py (8.5 M parameters, float32, AdamW, gradients clipped); processes of their own
make them in turn, as in benchmarks/train.py. `jaxllm_live`, `trl` and `tunix` compute the reference
in every step; `jaxllm` has its log-probabilities from before, which is what the stage does unless
told otherwise. At the end each process tells the most memory it has held.
"""

import sys
import tempfile
from collections.abc import Callable

import numpy as np
from in_turn import Step, compare
from llama import VOCAB, jaxllm_training, transformers_llama, tunix_llama

PAIRS, LENGTH, PROMPT = 16, 256, 64


def token_ids() -> np.ndarray:
    """[pairs, better and worse, length]; both begin with the same prompt."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (PAIRS, 2, LENGTH))
    ids[:, 1, :PROMPT] = ids[:, 0, :PROMPT]
    return ids


def jaxllm_step(live: bool) -> Step:
    """A step of ours; each pair is a row."""
    import jax
    import jax.numpy as jnp

    from jaxllm.models.transformer import SHARDING_RULES, init_params
    from jaxllm.objectives.dpo import DpoLossConfig, dpo
    from jaxllm.training.step import init_state, jit_step, sparing_step, state_shapes

    def objective(model):
        return dpo(
            model, DpoLossConfig(), 2, (lambda params: params["reference"]) if live else None
        )

    model, optimizer, mesh, step = jaxllm_training(objective)
    ids = token_ids().reshape(PAIRS, 2 * LENGTH)
    places = np.arange(2 * LENGTH)
    within = places % LENGTH
    rows = {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=1),
        "positions": within,
        "segment_ids": 1 + places // LENGTH,
        "ranking_ids": np.ones_like(places),
    }
    batch = {
        name: jnp.asarray(np.broadcast_to(array, (PAIRS, 2 * LENGTH)), jnp.int32)
        for name, array in rows.items()
    }
    weighed = {
        "loss_weights": (within >= PROMPT - 1) & (within < LENGTH - 1),
        "scores": places < LENGTH,
        "reference_log_probs": -1000.0 * (within == LENGTH - 1),
    }
    batch |= {
        name: jnp.asarray(np.broadcast_to(array, (PAIRS, 2 * LENGTH)), jnp.float32)
        for name, array in weighed.items()
    }
    with jax.set_mesh(mesh):
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        frozen = {"reference": jax.tree.map(jnp.copy, params)} if live else {}
        shapes = state_shapes(jax.eval_shape(lambda: params), optimizer, SHARDING_RULES, mesh)
        state = init_state(params, optimizer, shapes)
        jitted = jit_step(step, shapes, mesh)
        temporary = jitted.lower(state, frozen, batch).compile().memory_analysis()
    del params
    print(f"temporaries of a step: {temporary.temp_size_in_bytes / 1e6:.0f} MB", file=sys.stderr)
    sparing = sparing_step(jitted)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = sparing(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def trl_step() -> Step:
    """A step of TRL's, by its own batch, `training_step` and optimizer."""
    import datasets
    import torch
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()

    def words(ids) -> str:
        return " ".join(f"t{n}" for n in ids)

    pairs = token_ids()
    data = datasets.Dataset.from_dict(
        {
            "prompt": [words(pair[0, :PROMPT]) for pair in pairs],
            # Its end follows, as the tokenizer's end of a text.
            "chosen": [" " + words(pair[0, PROMPT : LENGTH - 1]) for pair in pairs],
            "rejected": [" " + words(pair[1, PROMPT : LENGTH - 1]) for pair in pairs],
        }
    )
    names = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    names.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=names, pad_token="t0", eos_token="t1")
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PAIRS,
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
        beta=0.1,
    )
    options = {"max_position_embeddings": LENGTH, "use_cache": False}
    model, reference = (transformers_llama(**options) for _ in range(2))
    trainer = trl.DPOTrainer(
        model=model.train(),
        ref_model=reference,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # its loop, which is not entered, sets it
    optimizer = trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> None:
        optimizer.zero_grad()
        trainer.training_step(model, dict(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    shapes = {name: tuple(each.shape) for name, each in batch.items() if hasattr(each, "shape")}
    print(f"TRL's batch: {shapes}", file=sys.stderr)
    return run


def tunix_step() -> Step:
    """A step of Tunix's, by its own `_prepare_inputs` (which asks the reference) and train step."""
    import jax
    import optax
    from flax import nnx
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    model, reference = tunix_llama(), tunix_llama()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    trainer = DPOTrainer(
        model,
        reference,
        optimizer,
        DPOTrainingConfig(eval_every_n_steps=1000, max_steps=1000, beta=0.1),
    )
    pairs = token_ids()
    prompts, responses = pairs[:, 0, :PROMPT], pairs[:, :, PROMPT:]
    data = TrainingInput(
        prompt_ids=prompts,
        prompt_mask=np.ones_like(prompts),
        chosen_ids=responses[:, 0],
        chosen_mask=np.ones_like(responses[:, 0]),
        rejected_ids=responses[:, 1],
        rejected_mask=np.ones_like(responses[:, 1]),
    )
    step, _ = trainer.jit_train_and_eval_step()
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
    print(f"Tunix's parameters: {dtypes}", file=sys.stderr)

    def run() -> None:
        jax.block_until_ready(step(trainer._prepare_inputs(data)))

    return run


STEPS: dict[str, Callable[[], Step]] = {
    "jaxllm_live": lambda: jaxllm_step(live=True),
    "jaxllm": lambda: jaxllm_step(live=False),
    "trl": trl_step,
    "tunix": tunix_step,
}


if __name__ == "__main__":
    compare(__doc__.splitlines()[0], __file__, STEPS, f"{PAIRS} pairs of 2 x {LENGTH} tokens")
