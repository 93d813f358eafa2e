"""Times the attention backends of this machine, forward and backward, and counts their memory.

    python benchmarks/attention.py [--rows 16 --seq 256 --heads 4 --head_dim 64 --documents 2]

Backends take turns, so that a busy machine is as busy for each; the figures are the median and
the fastest of all rounds. `--torch` adds PyTorch's scaled_dot_product_attention, if installed,
with the causal flag (one document) or the mask of the documents.
"""

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UserError
from jaxllm.ops.attention import BACKENDS, attention
from jaxllm.reporting.tables import print_table

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compiled_backend(backend: str, sizes: SimpleNamespace) -> tuple[Callable[[], object], int]:
    """A call of value and gradients, compiled, and its temporary memory in bytes."""
    shape = (sizes.rows, sizes.seq, sizes.heads, sizes.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, _DTYPES[sizes.dtype]) for key in keys]
    length = -(-sizes.seq // sizes.documents)
    index = jnp.broadcast_to(jnp.arange(sizes.seq), shape[:2])

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, index: jax.Array
    ) -> tuple:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return attention(
                query,
                key,
                value,
                query_positions=index % length,
                key_positions=index % length,
                query_segment_ids=index // length + 1,
                key_segment_ids=index // length + 1,
                in_order=True,
                backend=backend,
            )

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    compiled = jax.jit(run).lower(*arrays, index).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(*arrays, index)), memory


def torch_call(sizes: SimpleNamespace) -> Callable[[], object]:
    """The same by PyTorch, from arrays already in its layout [rows, heads, seq, head_dim]."""
    import torch

    shape = (sizes.rows, sizes.heads, sizes.seq, sizes.head_dim)
    dtype = getattr(torch, sizes.dtype)
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    d_out = torch.randn(shape, dtype=dtype)
    options: dict = {"is_causal": True}
    if sizes.documents > 1:
        document = torch.arange(sizes.seq) // -(-sizes.seq // sizes.documents)
        options = {"attn_mask": torch.tril(document[:, None] == document[None])}

    def run() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        return torch.autograd.grad(out, (query, key, value), d_out)

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 16), ("seq", 256), ("heads", 4), ("head_dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--documents", type=int, default=1, help="of equal length in a row")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--torch", action="store_true", help="time PyTorch too")
    sizes = SimpleNamespace(**vars(parser.parse_args()))

    calls, memory = {}, {}
    for backend in BACKENDS[1:]:
        try:
            calls[backend], memory[backend] = compiled_backend(backend, sizes)
        except UserError as refusal:
            print(refusal)
    if sizes.torch:
        calls["torch"] = torch_call(sizes)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(sizes.rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - begin))
    rows = [
        (
            name,
            f"{np.median(times[name]):.1f}",
            f"{min(times[name]):.1f}",
            f"{memory[name] / 2**20:.1f}" if name in memory else "",
        )
        for name in calls
    ]
    title = f"{sizes.rows} x {sizes.seq}, {sizes.heads} heads of {sizes.head_dim}, {sizes.dtype}"
    title += f", {sizes.documents} document(s) a row, {jax.default_backend()}"
    print_table(("backend", "median ms", "fastest ms", "temporaries MiB"), rows, title)


if __name__ == "__main__":
    main()
