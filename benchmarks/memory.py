"""Temporary memory of a train step, and size of its program, by XLA's own account.

    python benchmarks/memory.py

Nothing is run or allocated: steps are compiled from shapes. Two questions: what chunking the
vocabulary saves against full logits, and whether the program grows with depth.
"""

import dataclasses
import time
from unittest import mock

import jax
import jax.numpy as jnp

from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.objectives.next_token import NextTokenConfig, next_token
from jaxllm.ops import vocabulary
from jaxllm.reporting.tables import print_table
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.step import jit_step, make_train_step, state_shapes


def compiled_step(
    model: TransformerConfig, batch: int, seq: int, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """A train step compiled ahead of time."""
    optimizer = make_optimizer(OptimizerConfig())
    schedule = learning_rate_schedule(OptimizerConfig(), steps=1000)
    objective = next_token(model, NextTokenConfig())
    with jax.set_mesh(mesh):
        shapes = state_shapes(param_shapes(model), optimizer, SHARDING_RULES, mesh)
        step = make_train_step(objective, optimizer, schedule, micro_batches=1, seed=0)
        return (
            jit_step(step, shapes, mesh).lower(shapes, {}, batch_shapes(batch, seq, mesh)).compile()
        )


def batch_shapes(batch: int, seq: int, mesh: jax.sharding.Mesh) -> dict:
    """The batch of next-token training as `jax.ShapeDtypeStruct`s."""
    sharding = batch_sharding(mesh)
    row = jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=sharding)
    names = ("tokens", "targets", "segment_ids", "positions")
    weights = jax.ShapeDtypeStruct((batch, seq), jnp.float32, sharding=sharding)
    return dict.fromkeys(names, row) | {"loss_weights": weights}


def instructions(compiled: jax.stages.Compiled) -> int:
    """The number of HLO instructions of the optimised program."""
    return sum(" = " in line for line in compiled.as_text().splitlines())


def main() -> None:
    """Prints both tables."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = ModelConfig(layers=4, width=512, heads=8, dtype="float32", remat="full")
    model = architecture(config, 128 * 1024)
    rows = []
    temporary = {}
    for name, elements in (("full logits", 2**62), ("chunked", vocabulary._CHUNK_ELEMENTS)):
        with mock.patch.object(vocabulary, "_CHUNK_ELEMENTS", elements):
            memory = compiled_step(model, batch=4, seq=2048, mesh=mesh).memory_analysis()
        temporary[name] = memory.temp_size_in_bytes
        rows.append((name, f"{temporary[name] / 2**30:.2f} GiB"))
    rows.append(("chunked / full", f"{temporary['chunked'] / temporary['full logits']:.3f}"))
    title = "Temporaries of a step: width 512, 4 layers, vocabulary 128k, 4 x 2048, remat full"
    print_table(("vocabulary loss", "temporaries"), rows, title)

    rows = []
    for layers in (12, 48):
        model = architecture(dataclasses.replace(config, width=128, layers=layers), 8192)
        begin = time.perf_counter()
        compiled = compiled_step(model, batch=8, seq=256, mesh=mesh)
        seconds = time.perf_counter() - begin
        rows.append((str(layers), f"{instructions(compiled):,}", f"{seconds:.1f} s"))
    print_table(("layers", "HLO instructions", "tracing and compiling"), rows, "Depth")


if __name__ == "__main__":
    main()
