"""Seconds and MFU of training steps on one GPU or TPU: pretraining, low-rank pairs, preferences.

    python benchmarks/accelerator.py [--only=pretrain,lora,dpo] [--rows=32] [--remat=dots,none]

The model is of GPT-2's size (12 layers of 768, vocabulary of 50,304), bfloat16 with float32
parameters, on rows of 1,024 tokens in which documents of some hundred tokens follow each other.
Of each step the median of ten is told, after two that are not counted; MFU counts as
docs/performance.md says, against the device's stated peak. `lora` trains pairs of rank 8 beside
attention and MLP, of a base in `--base` (bfloat16, int8, nf4; empty: float32); `dpo` pairs of
responses of 512 tokens, their reference computed before. `--profile=FOLDER` also tells which
operations of the first step the time goes to.
"""

import argparse
import collections
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import trees
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.lora import LoraConfig, init_pairs, trained_pattern
from jaxllm.models.quantised import held, rounded
from jaxllm.models.transformer import SHARDING_RULES, init_params
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.dpo import DpoLossConfig, dpo
from jaxllm.objectives.next_token import next_token
from jaxllm.planning.flops import model_training_flops_per_token
from jaxllm.planning.peaks import peak_flops
from jaxllm.reporting.tables import print_table
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.step import init_state, jit_step, make_train_step, state_shapes

VOCAB, SEQ = 50_304, 1024
STEPS = 10


def batch_of(rows: int, work: str) -> dict[str, jax.Array]:
    """Random tokens in rows of documents, for `dpo` in rows of two responses."""
    rng = np.random.default_rng(0)
    begins = np.zeros((rows, SEQ), bool)
    begins[:, 0] = True
    for row in begins:
        row[SEQ // 2 if work == "dpo" else rng.choice(SEQ, 3)] = True
    index = np.broadcast_to(np.arange(SEQ), begins.shape)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    tokens = rng.integers(3, VOCAB, (rows, SEQ))
    found = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": positions,
        "segment_ids": np.cumsum(begins, axis=1),
        "ranking_ids": np.ones((rows, SEQ)),
    }
    weighed = {
        "loss_weights": np.ones((rows, SEQ)),
        "scores": index < SEQ // 2,
        "reference_log_probs": np.where(index % (SEQ // 2) == SEQ // 2 - 1, -5000.0, 0.0),
    }
    return {name: jnp.asarray(array, jnp.int32) for name, array in found.items()} | {
        name: jnp.asarray(array, jnp.float32) for name, array in weighed.items()
    }


def measured(work: str, rows: int, remat: str, base: str, profile: str) -> tuple[str, ...]:
    """A line of the table."""
    config = ModelConfig(
        layers=12, width=768, heads=12, remat=remat, dtype="bfloat16", vocab_size=VOCAB
    )
    model, lora = architecture(config, VOCAB), LoraConfig(8)
    optimizer = make_optimizer(OptimizerConfig())
    objective = (
        dpo(model, DpoLossConfig(), 2) if work == "dpo" else next_token(model, CrossEntropyConfig())
    )
    schedule = learning_rate_schedule(OptimizerConfig(), steps=1000)
    step = make_train_step(objective, optimizer, schedule, micro_batches=1, seed=0)
    mesh, batch = make_mesh(MeshConfig(), jax.devices()[:1]), batch_of(rows, work)
    with jax.set_mesh(mesh):
        params: dict[str, Any] = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        pattern = ".*"
        if work == "lora":
            pairs = jax.jit(lambda p, key: init_pairs(rounded(p, base), lora, key))
            added = pairs(params, jax.random.key(1))
            if base:
                params = jax.jit(lambda p: held(p, base))(params)
            params = trees.merge(params, added)
            pattern = trained_pattern("lora", lora)
        trained, frozen = trees.split(params, pattern)
        paths = {path for path, _ in trees.leaves_with_paths(trained)}
        shapes = state_shapes(jax.eval_shape(lambda: trained), optimizer, SHARDING_RULES, mesh)
        state = init_state(trained, optimizer, shapes)
        begin = time.perf_counter()
        jitted = jit_step(step, shapes, mesh)
        compiled = jitted.lower(state, frozen, batch).compile()
        compiling = time.perf_counter() - begin
        seconds = []
        for number in range(2 + STEPS):
            begin = time.perf_counter()
            state, metrics = jitted(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            if number >= 2:
                seconds.append(time.perf_counter() - begin)
        if profile:
            with jax.profiler.trace(profile):
                jax.block_until_ready(jitted(state, frozen, batch))
            print_profile(profile, compiled.as_text())
    median = statistics.median(seconds)
    tokens = rows * SEQ
    flops = model_training_flops_per_token(model, SEQ, 1.0, paths) * tokens / median
    peak = peak_flops(jax.devices()[0].device_kind)
    return (
        f"{work} {base}",
        remat,
        f"{rows} x {SEQ:,}",
        f"{1000 * median:.1f}",
        f"{tokens / median:,.0f}",
        f"{flops / peak:.1%}" if peak else "",
        f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.1f}",
        f"{compiling:.0f}",
        f"{float(metrics['loss']):.4f}",
    )


def print_profile(folder: str, program: str, most: int = 40) -> None:
    """Operations by their time on the device, with what they were written as."""
    written = dict(re.findall(r'%(\S+) = .*metadata=\{op_name="([^"]*)"', program))
    path = max(Path(folder).rglob("*.xplane.pb"), key=lambda found: found.stat().st_mtime)
    spent: collections.Counter[tuple[str, str]] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        lines = [line for line in plane.lines if line.name.startswith("Stream")]
        for event in (event for line in lines for event in line.events):
            operation = str(dict(event.stats).get("hlo_op", ""))
            spent[operation, event.name] += event.duration_ns
    total = sum(spent.values())
    rows = [
        (
            f"{nanoseconds / 1e6:.2f}",
            f"{nanoseconds / total:.1%}",
            operation[:40],
            kernel[:40],
            re.sub(r"jit\(\w+\)/|\w+\(", "", written.get(operation, ""))[-70:],
        )
        for (operation, kernel), nanoseconds in spent.most_common(most)
    ]
    titles = ("ms", "share", "operation", "kernel", "written as")
    print_table(titles, rows, f"{total / 1e6:.1f} ms of kernels")


def main() -> None:
    """Prints a table, a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="pretrain,lora,dpo")
    parser.add_argument("--rows", default="32")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--base", default="")
    parser.add_argument("--profile", default="")
    options = parser.parse_args()
    lines = []
    for work in options.only.split(","):
        for rows in map(int, options.rows.split(",")):
            for remat in options.remat.split(","):
                bases = options.base.split(",") if work == "lora" else [""]
                for base in bases:
                    line = measured(work, rows, remat, base, options.profile)
                    print(*line, sep="  ", flush=True)
                    lines.append(line)
    titles = ("", "remat", "tokens", "ms", "tokens/s", "MFU", "GiB", "compiling s", "loss")
    print_table(titles, lines, f"Steps on one {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
