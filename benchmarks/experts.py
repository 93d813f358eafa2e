"""Time and temporary memory of a mixture of experts, forward and backward, on one device.

    python benchmarks/experts.py [--experts 8 --per_token 2 --tokens 4096 --width 256 --inner 704]

Against a loop that multiplies every token by every expert, which is what routing should save, and
against one gated MLP as wide as the experts that a token goes to, which does the same work
without routing. The variants take turns, as the speed of a shared machine drifts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.ops.experts import ExpertKernels, expert_mlp, route
from jaxllm.reporting.tables import print_table

Arrays = tuple[Array, ...]


def every_expert(x: Array, choices: Array, weights: Array, *kernels: Array) -> Array:
    """Every expert computes every token; the weights of those not chosen are 0."""
    out = jnp.zeros(x.shape, jnp.float32)
    for expert, (gate, up, down) in enumerate(zip(*kernels, strict=True)):
        weight = jnp.sum(jnp.where(choices == expert, weights, 0.0), axis=-1)
        out += weight[..., None] * gated_mlp(x, gate, up, down)
    return out.astype(x.dtype)


def gated_mlp(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """One MLP of kernels in the dtype of `x`."""
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def routed_experts(
    x: Array, choices: Array, weights: Array, gate: Array, up: Array, down: Array
) -> Array:
    """What the library computes."""
    return expert_mlp(x, choices, weights, *map(ExpertKernels, (gate, up, down)), jax.nn.silu)


def active_width(x: Array, choices: Array, weights: Array, *kernels: Array) -> Array:
    """One MLP as wide as the first k experts side by side."""
    k = choices.shape[-1]
    gate, up = (jnp.concatenate(list(kernel[:k]), axis=1) for kernel in kernels[:2])
    return gated_mlp(x, gate, up, jnp.concatenate(list(kernels[2][:k]), axis=0))


VARIANTS: dict[str, Callable[..., Array]] = {
    "every expert": every_expert,
    "expert_mlp": routed_experts,
    "one MLP of the active width": active_width,
}


def inputs(options: argparse.Namespace, skew: float) -> Arrays:
    """x, choices, weights and kernels; `skew` is added to the score of the first expert."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (1, options.tokens)
    scores = jax.random.normal(keys[0], (*shape, options.experts)).at[..., 0].add(skew)
    routing = route(scores, options.per_token, normalise=True, counted=jnp.ones(shape, bool))

    def kernel(key: Array, fan_in: int, fan_out: int) -> Array:
        return fan_in**-0.5 * jax.random.normal(key, (options.experts, fan_in, fan_out))

    return (
        jax.random.normal(keys[1], (*shape, options.width), options.dtype),
        routing.choices,
        routing.weights,
        kernel(keys[2], options.width, options.inner),
        kernel(keys[3], options.width, options.inner),
        kernel(keys[4], options.inner, options.width),
    )


def compile_step(function: Callable[..., Array], arrays: Arrays) -> jax.stages.Compiled:
    """The function and its gradients by x, weights and kernels, compiled."""

    def loss(*arrays: Array) -> Array:
        return jnp.sum(function(*arrays).astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5))).lower(*arrays).compile()


def measure(compiled: dict[str, jax.stages.Compiled], arrays: Arrays, repeats: int) -> dict:
    """Median seconds of each program; the first run of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats + 1):
        for name, step in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Prints a table for even routing and one for a skewed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("experts", 8),
        ("per_token", 2),
        ("tokens", 4096),
        ("width", 256),
        ("inner", 704),
        ("repeats", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    for title, skew in (("scores alike", 0.0), ("every token to the first expert", 20.0)):
        arrays = inputs(options, skew)
        compiled = {name: compile_step(variant, arrays) for name, variant in VARIANTS.items()}
        seconds = measure(compiled, arrays, options.repeats)
        rows = [
            (
                name,
                f"{1e3 * seconds[name]:.0f} ms",
                f"{seconds[name] / seconds['expert_mlp']:.2f}",
                f"{step.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB",
            )
            for name, step in compiled.items()
        ]
        shape = f"{options.per_token} of {options.experts} experts, {options.tokens} tokens"
        header = ("forward and backward", "median", "of expert_mlp", "temporaries")
        print_table(header, rows, f"{shape}, {options.dtype}, {title}")


if __name__ == "__main__":
    main()
