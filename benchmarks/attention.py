"""Times the attention backends of this machine, forward and backward, and counts their memory.

    python benchmarks/attention.py [--rows 16 --seq 256 --heads 4 --head_dim 64 --documents 2]

Backends take turns, so that a busy machine is as busy for each; the figures are the median and
the fastest of all rounds. Documents have lengths drawn at random, others in every row: a block of
keys is left out only where no row of a group needs it. `--torch` adds PyTorch's
scaled_dot_product_attention, if installed, with the causal flag (one document) or the mask of the
documents.
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


def documents(sizes: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids [rows, seq] of rows cut at random into as many documents."""
    rng = np.random.default_rng(0)
    begins = np.zeros((sizes.rows, sizes.seq), bool)
    begins[:, 0] = True
    for row in begins:
        row[1 + rng.choice(sizes.seq - 1, sizes.documents - 1, replace=False)] = True
    index = np.broadcast_to(np.arange(sizes.seq), begins.shape)
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return index - first, np.cumsum(begins, axis=1)


def compiled_backend(backend: str, sizes: SimpleNamespace) -> tuple[Callable[[], object], int]:
    """A call of value and gradients, compiled, and its temporary memory in bytes."""
    shape = (sizes.rows, sizes.seq, sizes.heads, sizes.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, _DTYPES[sizes.dtype]) for key in keys]
    places = [jnp.asarray(x, jnp.int32) for x in documents(sizes)]

    def run(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        d_out: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
    ) -> tuple:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return attention(
                query,
                key,
                value,
                query_positions=positions,
                key_positions=positions,
                query_segment_ids=segment_ids,
                key_segment_ids=segment_ids,
                in_order=True,
                backend=backend,
            )

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    compiled = jax.jit(run).lower(*arrays, *places).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(*arrays, *places)), memory


def torch_call(sizes: SimpleNamespace) -> Callable[[], object]:
    """The same by PyTorch, from arrays already in its layout [rows, heads, seq, head_dim]."""
    import torch

    shape = (sizes.rows, sizes.heads, sizes.seq, sizes.head_dim)
    dtype = getattr(torch, sizes.dtype)
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    d_out = torch.randn(shape, dtype=dtype)
    options: dict = {"is_causal": True}
    if sizes.documents > 1:
        document = torch.from_numpy(documents(sizes)[1])
        same = document[:, None, :, None] == document[:, None, None, :]
        options = {"attn_mask": torch.tril(same)}

    def run() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        return torch.autograd.grad(out, (query, key, value), d_out)

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 16), ("seq", 256), ("heads", 4), ("head_dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--documents", type=int, default=1, help="in a row, of random lengths")
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
