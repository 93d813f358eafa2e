"""Host memory of importing published weights, beyond the model's own size.

    python benchmarks/import_memory.py [--layers=20] [--width=512] [--fsdp=1]

Writes a random Llama of that size as one file (20 layers of 512: 320 MB in float32), and reads it
in a fresh process, onto the CPU. What is told is the growth of the process's own memory at its
peak (`RssAnon`; pages of the file that the system keeps beside it are not the process's), against
the size of the parameters and of the largest tensor of the file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from jaxllm import trees
from jaxllm.conversion.configuration import read_config
from jaxllm.conversion.reading import read_params
from jaxllm.conversion.tables import TABLES
from jaxllm.conversion.weights import tensors
from jaxllm.conversion.writing import write_published
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

MB = 1e6
VOCAB = 32_000


def write(folder: Path, layers: int, width: int) -> None:
    """A random model in `folder`."""
    heads = width // 64
    config = ModelConfig(
        layers=layers, width=width, heads=heads, vocab_size=VOCAB, max_positions=1024
    )
    model = architecture(config, VOCAB)
    draw = np.random.default_rng(0)
    params = trees.map_with_paths(
        lambda _, leaf: draw.standard_normal(leaf.shape, np.float32), param_shapes(model)
    )
    tokenizer = ByteTokenizer()
    write_published(
        folder, config, model, params, tokenizer, dtype="float32", max_shard_bytes=10**12
    )


def own_memory() -> float:
    """Megabytes of the process that are no file's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / MB


def measure(folder: Path, fsdp: int) -> dict[str, float]:
    """Reads the model of `folder`, and watches the memory meanwhile."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    model = architecture(read_config(folder), VOCAB)
    laid_out = tensors(TABLES["llama"].weights, model)
    jax.block_until_ready(jax.numpy.zeros(8))  # the backend's own memory is there before
    before = own_memory()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    params = jax.block_until_ready(read_params(folder, model, mesh))
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "model": 4 * trees.size(params) / MB,
        "largest": max(4 * math.prod(tensor.shape) for tensor in laid_out) / MB,
        "growth": peak - before,
    }


def main() -> None:
    """Writes, measures in a fresh process, and prints a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.fsdp)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.layers, arguments.width)
        command = [sys.executable, __file__, f"--measure={folder}"]
        command.append(f"--fsdp={arguments.fsdp}")
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    print(
        f"model {found['model']:.0f} MB, largest tensor {found['largest']:.0f} MB: peak "
        f"{found['growth']:.0f} MB, {found['growth'] - found['model']:.0f} MB beyond the model "
        f"({found['seconds']:.1f} s)"
    )


if __name__ == "__main__":
    main()
