"""Temporary memory of a train step, and size of its program, by XLA's own account.

    python benchmarks/memory.py

Nothing is run or allocated: steps are compiled from shapes. Four questions: what chunking the
vocabulary saves against full logits, the same of a student and a teacher twice as wide, whether the
program grows with depth, and what the large presets take on each of eight devices.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

# Before JAX is imported; simulated devices share few cores.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp

from jaxllm import command_line, trees
from jaxllm.config import from_dict
from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import SHARDING_RULES, param_shapes
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.distillation import TEACHER_TREE, distillation
from jaxllm.objectives.next_token import next_token
from jaxllm.ops import vocabulary
from jaxllm.ops.divergence import DivergenceConfig
from jaxllm.reporting.tables import print_table
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.rules import with_shardings
from jaxllm.stages.pretrain import PretrainConfig
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.step import jit_step, make_train_step, state_shapes


def compiled_step(
    model: TransformerConfig,
    batch: int,
    seq: int,
    mesh: jax.sharding.Mesh,
    teacher: TransformerConfig | None = None,
) -> jax.stages.Compiled:
    """A train step compiled ahead of time; with a teacher, one of distillation."""
    optimizer = make_optimizer(OptimizerConfig())
    schedule = learning_rate_schedule(OptimizerConfig(), steps=1000)
    if teacher:
        objective = distillation(model, DivergenceConfig("jsd"), teacher)
        layout = with_shardings(param_shapes(teacher), SHARDING_RULES, mesh)
        frozen = {TEACHER_TREE: layout}
    else:
        objective, frozen = next_token(model, CrossEntropyConfig()), {}
    with jax.set_mesh(mesh):
        shapes = state_shapes(param_shapes(model), optimizer, SHARDING_RULES, mesh)
        step = make_train_step(objective, optimizer, schedule, micro_batches=1, seed=0)
        return (
            jit_step(step, shapes, mesh)
            .lower(shapes, frozen, batch_shapes(batch, seq, mesh))
            .compile()
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
    """Prints the tables."""
    vocabulary_and_depth()
    presets()


def vocabulary_and_depth() -> None:
    """The first three questions, on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = ModelConfig(layers=4, width=512, heads=8, dtype="float32", remat="full")
    model = architecture(config, 128 * 1024)
    title = "Temporaries of a step: width 512, 4 layers, vocabulary 128k, 4 x 2048, remat full"
    chunks_saved(title, lambda: compiled_step(model, batch=4, seq=2048, mesh=mesh))
    teacher = architecture(dataclasses.replace(config, width=1024, heads=16), 128 * 1024)
    title = "Of distillation: the same student, a teacher of width 1024, 2 x 2048"
    chunks_saved(title, lambda: compiled_step(model, 2, 2048, mesh, teacher))

    rows = []
    for layers in (12, 48):
        model = architecture(dataclasses.replace(config, width=128, layers=layers), 8192)
        begin = time.perf_counter()
        compiled = compiled_step(model, batch=8, seq=256, mesh=mesh)
        seconds = time.perf_counter() - begin
        rows.append((str(layers), f"{instructions(compiled):,}", f"{seconds:.1f} s"))
    print_table(("layers", "HLO instructions", "tracing and compiling"), rows, "Depth")


def chunks_saved(title: str, compiled: Callable[[], jax.stages.Compiled]) -> None:
    """Prints the temporaries of a step whose logits are there whole, and chunk by chunk."""
    rows = []
    temporary = {}
    for name, tokens in (("full logits", {"cpu": 2**62}), ("chunked", vocabulary._CHUNK_TOKENS)):
        with mock.patch.object(vocabulary, "_CHUNK_TOKENS", tokens):
            temporary[name] = compiled().memory_analysis().temp_size_in_bytes
        rows.append((name, f"{temporary[name] / 2**30:.2f} GiB"))
    rows.append(("chunked / full", f"{temporary['chunked'] / temporary['full logits']:.3f}"))
    print_table(("vocabulary loss", "temporaries"), rows, title)


def presets() -> None:
    """The fourth: one micro-batch of 8 rows, on 8 devices, fsdp 4 x tensor 2, bfloat16."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    rows = []
    for preset in ("1b", "8b"):
        path = Path(__file__).parent.parent / "configs" / "pretrain.py"
        loaded = command_line.load_config(f"{path}:{preset}")
        command_line.override(loaded, ["--config.data.train=-", "--config.model.dtype=bfloat16"])
        config = from_dict(PretrainConfig, loaded)
        model = architecture(config.model, config.tokenizer.vocab_size)
        begin = time.perf_counter()
        compiled = compiled_step(model, batch=8, seq=config.data.seq_len, mesh=mesh)
        memory = compiled.memory_analysis()
        rows.append(
            (
                f":{preset}",
                f"{trees.size(param_shapes(model)):,}",
                f"{memory.argument_size_in_bytes:,}",
                f"{memory.temp_size_in_bytes:,}",
                f"{time.perf_counter() - begin:.0f} s",
            )
        )
    heads = ("preset", "parameters", "state and batch, bytes a device", "temporaries", "compiling")
    print_table(heads, rows, "8 devices, fsdp 4 x tensor 2, 8 rows of 2,048, bfloat16")


if __name__ == "__main__":
    main()
