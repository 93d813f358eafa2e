"""Seconds of a training step on CPU, beside Transformers, eager and compiled, and plain Flax; and
of one that trains low-rank pairs, beside PEFT.

    python benchmarks/train.py [--turns=6] [--only=jaxllm,eager] [--memory=kept]
    python benchmarks/train.py --only=jaxllm_lora,peft,jaxllm

Needs `pip install -e .[peers]`, and a C++ compiler for `torch.compile`. Every competitor is a
process of its own, on as many threads as there are cores; they make three steps in turn, so that
what else the machine does hits all alike. The first of three is not counted: it finds its memory
and the caches taken. The model is a Llama of 8.5 M parameters (256 wide, 8 layers,
4 heads, MLP of 704, vocabulary of 8,192, tied) on batches of 16 x 256 tokens, float32, AdamW.
`products` are the products of that step with parameters, one after another, which all of them make;
attention's own come on top. `jaxllm_lora` and `peft` train pairs of rank 8 beside the matrices of
attention and MLP. At the end each process tells the most memory it has held. jaxllm sets glibc's
allocator as it does when it trains (`jaxllm/host_memory.py`); `--memory` sets it by the
environment, for every process alike.
"""

import argparse
import os
import resource
import statistics
import sys
from collections.abc import Callable

from in_turn import Step, measure, work
from llama import HEADS, LAYERS, MLP, VOCAB, WIDTH, jaxllm_training, transformers_llama

BATCH, SEQ = 16, 256
TOKENS = BATCH * SEQ
RANK = 8
COMPETITORS = ("jaxllm", "eager", "compiled", "plain_flax", "products", "torch_products")
# Arrays that are made and freed in every step cost a page fault for each 4 KiB: with `large-pages`
# for each 2 MiB, and with `kept`, where freed memory is not given back to the system, none.
MEMORY: dict[str, dict[str, str]] = {
    "default": {},
    "large-pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "kept": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(10**11),
    },
}


def jaxllm_step(rank: int = 0) -> Step:
    """A step of ours, in a process set up as for the stage `pretrain`, of all parameters or of
    low-rank pairs; it prints the temporaries of its program to stderr."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm import trees
    from jaxllm.models.lora import LoraConfig, init_pairs, trained_pattern
    from jaxllm.models.transformer import SHARDING_RULES, init_params
    from jaxllm.training.step import init_state, jit_step, sparing_step, state_shapes

    model, optimizer, mesh, step = jaxllm_training()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "positions": jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
        "loss_weights": jnp.ones(tokens.shape, jnp.float32),
    }
    lora = LoraConfig(rank)
    with jax.set_mesh(mesh):
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        if rank:
            pairs = jax.jit(lambda params, key: init_pairs(params, lora, key))
            params = trees.merge(params, pairs(params, jax.random.key(1)))
        trained, frozen = trees.split(params, trained_pattern(".*", lora))
        shapes = state_shapes(jax.eval_shape(lambda: trained), optimizer, SHARDING_RULES, mesh)
        state = init_state(trained, optimizer, shapes)
        jitted = jit_step(step, shapes, mesh)
        temporary = jitted.lower(state, frozen, batch).compile().memory_analysis()
    del params, trained
    print(f"temporaries of a step: {temporary.temp_size_in_bytes / 1e6:.0f} MB", file=sys.stderr)
    sparing = sparing_step(jitted)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = sparing(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def plain_flax_step() -> Step:
    """The step of benchmarks/plain_flax.py; it prints its temporaries too."""
    import jax
    import numpy as np
    from plain_flax import Model, compiled_step

    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ)))
    compiled, state = compiled_step(Model(VOCAB, WIDTH, LAYERS, HEADS, MLP), tokens)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporaries of a step of plain Flax: {temporary / 1e6:.0f} MB", file=sys.stderr)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*state))

    return run


def transformers_step(compiled: bool, rank: int = 0) -> Step:
    """A step of Transformers' Llama with PyTorch's fused AdamW; with a rank, of PEFT's pairs."""
    import torch

    model = transformers_llama(max_position_embeddings=SEQ, use_cache=False).train()
    if rank:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        pairs = peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, pairs)
    forward = torch.compile(model) if compiled else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))

    def run() -> None:
        optimizer.zero_grad()
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return run


def shapes_of_products() -> list[tuple[int, int]]:
    """(in, out) of every kernel, layers repeated; queries, keys and values apart."""
    layer = [(WIDTH, WIDTH)] * 4 + [(WIDTH, MLP)] * 2 + [(MLP, WIDTH)]
    return layer * LAYERS + [(WIDTH, VOCAB)]


def products_step() -> Step:
    """Forward and both backward products of every kernel, in JAX, and nothing else."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def one(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return x @ kernel, cotangent @ kernel.T, x.T @ cotangent

    arrays = {
        shape: (jnp.ones((TOKENS, shape[0])), jnp.ones(shape), jnp.ones((TOKENS, shape[1])))
        for shape in set(shapes_of_products())
    }

    def run() -> None:
        for shape in shapes_of_products():
            jax.block_until_ready(one(*arrays[shape]))

    return run


def torch_products_step() -> Step:
    """The same in PyTorch."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    arrays = {
        shape: (torch.ones(TOKENS, shape[0]), torch.ones(shape), torch.ones(TOKENS, shape[1]))
        for shape in set(shapes_of_products())
    }

    def run() -> None:
        for shape in shapes_of_products():
            x, kernel, cotangent = arrays[shape]
            x @ kernel, cotangent @ kernel.T, x.T @ cotangent

    return run


STEPS: dict[str, Callable[[], Step]] = {
    "jaxllm": jaxllm_step,
    "jaxllm_lora": lambda: jaxllm_step(RANK),
    "peft": lambda: transformers_step(compiled=False, rank=RANK),
    "plain_flax": plain_flax_step,
    "eager": lambda: transformers_step(compiled=False),
    "compiled": lambda: transformers_step(compiled=True),
    "products": products_step,
    "torch_products": torch_products_step,
}


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--only", default=",".join(COMPETITORS))
    parser.add_argument("--memory", choices=MEMORY, default="default")
    parser.add_argument("--worker", choices=STEPS)
    options = parser.parse_args()
    if options.worker:
        work(STEPS[options.worker]())
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{options.worker} held {held / 1000:,.0f} MB at the most", file=sys.stderr)
        return

    from jaxllm.reporting.tables import print_table

    names = options.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only: {', '.join(unknown)} is unknown; there are {', '.join(STEPS)}")
    seconds = measure(__file__, names, options.turns, MEMORY[options.memory])
    ours = statistics.median(seconds[names[0]])
    rows = [
        (
            name,
            f"{statistics.median(times):.2f}",
            f"{min(times):.2f}",
            f"{TOKENS / statistics.median(times):,.0f}",
            f"{statistics.median(times) / ours:.2f}",
        )
        for name, times in seconds.items()
    ]
    heads = ("", "median s", "fastest s", "tokens/s", f"times {names[0]}")
    print_table(heads, rows, f"A step of {TOKENS:,} tokens, {2 * options.turns} of each")


if __name__ == "__main__":
    main()
