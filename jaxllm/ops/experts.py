"""Mixture of experts: which experts each token goes to, and the MLPs of its experts.

No expert has a capacity, so no token is ever dropped: assignments are sorted by expert and
multiplied in groups of whatever size they have. On a mesh the experts lie split over the axis
`expert`, which splits the batch as well.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllm.ops.grouped import grouped_matmul
from jaxllm.ops.products import PRODUCT
from jaxllm.sharding.mesh import BATCH_AXES


class ExpertKernels(NamedTuple):
    """One matrix of every expert, W + A·B where there is a low-rank pair."""

    kernel: Float[Array, "experts in out"]
    a: Float[Array, "experts in rank"] | None = None
    b: Float[Array, "experts rank out"] | None = None


class Routing(NamedTuple):
    """Where each token goes, and what the auxiliary losses need."""

    choices: Int[Array, "batch seq k"]
    """The experts of each token, the most probable first; no two are the same."""
    weights: Float[Array, "batch seq k"]
    """The share of each of these experts in the output; float32."""
    load_balance: Float[Array, " batch"]
    """The load-balance loss of each row times its counted tokens; see `route`."""
    router_z: Float[Array, " batch"]
    """The router z-loss, summed over the counted tokens of each row; see `route`."""


def route(
    logits: Float[Array, "batch seq experts"],
    per_token: int,
    *,
    normalise: bool,
    counted: Bool[Array, "batch seq"] | Float[Array, "batch seq"],
) -> Routing:
    """Sends each token to its k most probable experts; all in float32.

    With p = softmax(logits) over all E experts, the weights are the k largest of p.

    Load balance is Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4, for k
    experts a token and within each row: E · Σₑ fₑ Pₑ, where, over the n counted tokens of the
    row, fₑ is the share of the n·k assignments that went to expert e, and Pₑ the mean of pₑ. It
    is 1 where either is uniform. Returned is n times that, so that the sum over rows, divided by
    all counted tokens, is the mean. Gradients flow through P alone.

    Router z is Zoph et al. 2022, https://arxiv.org/abs/2202.08906, equation 5, a sum over
    tokens: Σ logsumexp(logits)².

    Args:
        logits: the router's scores.
        per_token: k, the experts of a token.
        normalise: divide the weights by their sum, so that they sum to 1: the softmax over the
            chosen logits alone.
        counted: 1 for tokens that take part in the losses, 0 for padding.
    """
    logits = logits.astype(jnp.float32)
    experts = logits.shape[-1]
    top_logits, choices = jax.lax.top_k(logits, per_token)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    chosen_sum = jax.nn.logsumexp(top_logits, axis=-1) if normalise else log_sum_exp
    weights = jnp.exp(top_logits - chosen_sum[..., None])

    counts = counted.astype(jnp.float32)
    assigned = jax.nn.one_hot(choices, experts, dtype=jnp.float32) * counts[..., None, None]
    probabilities = jax.nn.softmax(logits, axis=-1) * counts[..., None]
    load_balance = jnp.sum(jnp.sum(assigned, axis=(1, 2)) * jnp.sum(probabilities, axis=1), axis=-1)
    tokens = jnp.maximum(jnp.sum(counts, axis=-1), 1.0)
    return Routing(
        choices=choices,
        weights=weights,
        load_balance=load_balance * experts / (per_token * tokens),
        router_z=jnp.sum(log_sum_exp**2 * counts, axis=-1),
    )


def expert_mlp(
    x: Float[Array, "batch seq embed"],
    choices: Int[Array, "batch seq k"],
    weights: Float[Array, "batch seq k"],
    gate: ExpertKernels,
    up: ExpertKernels,
    down: ExpertKernels,
    activation: Callable[[Array], Array],
    reduction_dtype: str = "float32",
) -> Float[Array, "batch seq embed"]:
    """Σⱼ weightsⱼ · down(activation(gate(x)) · up(x)), j over the experts that a token chose.

    Matrix products are of the dtype of `x` and accumulate in float32; the sum is float32. The
    work is that of the k chosen experts, however unevenly they are chosen.

    On a mesh each device gathers the tokens of the devices along `expert`, computes what its own
    experts, its share of their inner width along `tensor`, add to them, and the sums are
    scattered back. Kernels lie split over `expert`, `fsdp` and `tensor`, each dividing its
    dimension, and are gathered over `fsdp`.

    Args:
        x: hidden states.
        choices, weights: from `route`.
        gate, up, down: the experts' kernels, [experts, embed, inner] and [experts, inner, embed].
        activation: of the gate, elementwise.
        reduction_dtype: in which gradients of the kernels are summed over tokens and devices;
            never narrower than `x`.
    """
    # Gradients have the dtype of what they are of, so the kernels stay as wide as the sums.
    wide = jnp.promote_types(x.dtype, reduction_dtype)
    gate, up, down = jax.tree.map(lambda kernel: kernel.astype(wide), (gate, up, down))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _own_experts(x, choices, weights, gate, up, down, activation)
    # Rows that choose no expert where the mesh does not divide the batch, as with one prompt.
    missing = -x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padding = ((0, missing), (0, 0), (0, 0))
    rows = (
        jnp.pad(x, padding),
        jnp.pad(choices, padding, constant_values=-1),
        jnp.pad(weights, padding),
    )
    by_row = PartitionSpec(BATCH_AXES)
    to_inner = _specs(gate, "fsdp", "tensor")
    to_embed = _specs(down, "tensor", "fsdp")
    on_each_device: Callable[..., Array] = partial(_on_each_device, activation)
    sharded = jax.shard_map(
        on_each_device,
        in_specs=(by_row, by_row, by_row, to_inner, _specs(up, "fsdp", "tensor"), to_embed),
        out_specs=by_row,
        check_vma=False,
    )
    return sharded(*rows, gate, up, down)[: x.shape[0]]


def _specs(kernels: ExpertKernels, rows: str, columns: str) -> Any:
    """How they lie on the mesh: `ExpertKernels` of specs."""
    whole = ExpertKernels(
        PartitionSpec("expert", rows, columns),  # type: ignore[arg-type]
        PartitionSpec("expert", rows, None),  # type: ignore[arg-type]
        PartitionSpec("expert", None, columns),  # type: ignore[arg-type]
    )
    return whole if kernels.a is not None else ExpertKernels(whole.kernel)


def _on_each_device(
    activation: Callable[[Array], Array],
    x: Float[Array, "rows seq embed"],
    choices: Int[Array, "rows seq k"],
    weights: Float[Array, "rows seq k"],
    gate: ExpertKernels,
    up: ExpertKernels,
    down: ExpertKernels,
) -> Float[Array, "rows seq embed"]:
    """What `expert_mlp` does on one device of a mesh, with its parts of the arrays."""
    dtype = str(x.dtype)
    gate, up = (_gathered(kernels, rows_split=True, dtype=dtype) for kernels in (gate, up))
    down = _gathered(down, rows_split=False, dtype=dtype)
    gather = partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    x, choices, weights = (gather(array) for array in (x, choices, weights))
    choices = choices - jax.lax.axis_index("expert") * gate.kernel.shape[0]
    out = _own_experts(x, choices, weights, gate, up, down, activation)
    out = jax.lax.psum_scatter(out, "expert", tiled=True)
    return jax.lax.psum(out, "tensor")


def _gathered(kernels: ExpertKernels, rows_split: bool, dtype: str) -> ExpertKernels:
    """The kernels whole along the axis that `fsdp` splits, of which a pair has half."""
    kernel, a, b = kernels
    whole = _whole(kernel, 1 if rows_split else 2, dtype)
    if a is None or b is None:
        return ExpertKernels(whole)
    if rows_split:
        return ExpertKernels(whole, _whole(a, 1, dtype), b)
    return ExpertKernels(whole, a, _whole(b, 2, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(
    kernel: Float[Array, "experts _ _"], axis: int, dtype: str
) -> Float[Array, "experts _ _"]:
    """A kernel gathered over `fsdp` along `axis`, in its own dtype.

    It travels as `dtype`, which products are in; its gradient is summed in its own.
    """
    parts = jax.lax.all_gather(kernel.astype(dtype), "fsdp", axis=axis, tiled=True)
    return parts.astype(kernel.dtype)


def _whole_forward(kernel: Array, axis: int, dtype: str) -> tuple[Array, None]:
    return _whole(kernel, axis, dtype), None


def _whole_backward(axis: int, dtype: str, saved: None, cotangent: Array) -> tuple[Array]:
    del dtype, saved
    return (jax.lax.psum_scatter(cotangent, "fsdp", scatter_dimension=axis, tiled=True),)


_whole.defvjp(_whole_forward, _whole_backward)


def _own_experts(
    x: Float[Array, "batch seq embed"],
    choices: Int[Array, "batch seq k"],
    weights: Float[Array, "batch seq k"],
    gate: ExpertKernels,
    up: ExpertKernels,
    down: ExpertKernels,
    activation: Callable[[Array], Array],
) -> Float[Array, "batch seq embed"]:
    """`expert_mlp` on one device; a choice outside of [0, experts) adds nothing."""
    experts, k = gate.kernel.shape[0], choices.shape[-1]
    own = (choices >= 0) & (choices < experts)
    # Others' assignments are sorted to the end, where they are of no group.
    assignments = jnp.where(own, choices, experts).reshape(-1)
    order = jnp.argsort(assignments)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(assignments[:, None] == jnp.arange(experts), axis=0)

    # Widened and narrowed again, so that the gradients of the k copies are summed in float32.
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    repeated = jnp.repeat(wide, k, axis=0).astype(x.dtype)
    rows = _permute(repeated, order, inverse)

    def multiplied(
        rows: Float[Array, "rows in"], kernels: ExpertKernels
    ) -> Float[Array, "rows out"]:
        result = grouped_matmul(rows, kernels.kernel, sizes)
        if kernels.a is not None and kernels.b is not None:
            thin = grouped_matmul(rows, kernels.a, sizes)
            result = result + grouped_matmul(thin, kernels.b, sizes)
        return checkpoint_name(result, PRODUCT)

    inner = activation(multiplied(rows, gate)) * multiplied(rows, up)
    out = _permute(multiplied(inner, down), inverse, order)
    out = out.reshape(*choices.shape, -1).astype(jnp.float32)
    return jnp.sum(weights[..., None] * out, axis=-2).astype(x.dtype)


@jax.custom_vjp
def _permute(
    rows: Float[Array, "rows width"], order: Int[Array, " rows"], inverse: Int[Array, " rows"]
) -> Float[Array, "rows width"]:
    """rows[order]; `inverse` is the inverse permutation.

    The gradient is a permutation too. XLA would add row by row, as if they could collide.
    """
    return rows.at[order].get(mode="promise_in_bounds")


def _permute_forward(
    rows: Float[Array, "rows width"], order: Int[Array, " rows"], inverse: Int[Array, " rows"]
) -> tuple[Float[Array, "rows width"], tuple[Array, Array]]:
    return _permute(rows, order, inverse), (order, inverse)


def _permute_backward(
    saved: tuple[Array, Array], cotangent: Float[Array, "rows width"]
) -> tuple[Float[Array, "rows width"], None, None]:
    order, inverse = saved
    return _permute(cotangent, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)
