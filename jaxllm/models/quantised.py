"""A frozen base held in fewer bits, beside which low-rank pairs are trained (QLoRA).

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. A kernel [in, out] at the path P becomes

    P                   [in, out]        codes: int8, or uint4 of NormalFloat (NF4)
    P_quantised_scale   [in / 64, out]   of each block of 64 numbers of a column, float32

each with the leading axes that it has. It is made whole again where it is used, a layer at a time.
Rounding is that of Qwix (https://github.com/google/qwix). Scales are not quantised a second time.
"""

import math
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxllm import trees
from jaxllm.errors import UserError

HELD = ("", "bfloat16", "int8", "nf4")
"""How the base of pairs can be held; empty: as it is."""

SCALE = "_quantised_scale"

_KERNEL = r"stack_\d+/layer_\d+/(?!.*/experts/)(attention|mlp)/.*kernel"
_MATRIX = rf"{_KERNEL}|embedding|output|.*/experts/.*kernel"
_BLOCK = 64
_CODES = {"int8": jnp.int8, "nf4": jnp.uint4}


def held(params: trees.Tree, how: str) -> dict[str, Any]:
    """The parameters of a base, with its matrices in fewer bits.

    In bfloat16 these are all; in 8 and 4 bits those of attention and MLP, but for experts.

    Args:
        params: floating ones.
        how: of `HELD`.

    Raises:
        UserError: what is needed for it is not installed.
    """
    found: dict[str, Any] = {}
    for path, leaf in trees.leaves_with_paths(params):
        if how == "bfloat16" and is_held(path, how):
            leaf = leaf.astype(jnp.bfloat16)
        elif is_held(path, how):
            leaf, scale = _quantised(leaf, how)
            trees.insert(found, path + SCALE, scale)
        trees.insert(found, path, leaf)
    return found


def is_held(path: str, how: str) -> bool:
    """Whether `held` keeps the parameter at a path in fewer bits."""
    pattern = _MATRIX if how == "bfloat16" else _KERNEL
    return bool(how and re.fullmatch(pattern, path))


def rounded(params: trees.Tree, how: str) -> dict[str, Any]:
    """The parameters as `held` rounds them, in the dtypes that they have."""
    leaves = dict(trees.leaves_with_paths(held(params, how)))
    found: dict[str, Any] = {}
    for path, leaf in trees.leaves_with_paths(params):
        scale = leaves.get(path + SCALE)
        kernel = leaves[path] if scale is None else dequantised(leaves[path], scale)
        trees.insert(found, path, kernel.astype(leaf.dtype))
    return found


def whole_kernel(module: nn.Module, kernel: Num[Array, "in out"]) -> Float[Array, "in out"]:
    """The kernel of a module, made whole if it is quantised."""
    if not module.has_variable("params", "kernel" + SCALE):
        return kernel
    scale: Array = module.get_variable("params", "kernel" + SCALE)
    return dequantised(kernel, scale)


def dequantised(
    codes: Num[Array, "*lead in out"], scale: Float[Array, "*lead blocks out"]
) -> Float[Array, "*lead in out"]:
    """The matrix of codes and scales, float32."""
    qwix = _qwix()
    how = next(name for name, dtype in _CODES.items() if codes.dtype == dtype)
    return qwix.dequantize(qwix.QArray(codes, scale, qtype="nf4" if how == "nf4" else jnp.int8))


def _quantised(kernel: Float[Array, "*lead in out"], how: str) -> tuple[Array, Array]:
    rows = kernel.ndim - 2
    found = _qwix().quantize(
        kernel.astype(jnp.float32),
        qtype=how,
        channelwise_axes=(*range(rows), rows + 1),
        tiled_axes={rows: math.gcd(kernel.shape[rows], _BLOCK)},
    )
    return found.qvalue, found.scale


def check_installed(field: str) -> None:
    """Checks that there is what 8 and 4 bits need, which `field` asks for.

    Raises:
        UserError: there is not.
    """
    _qwix(field)


def _qwix(field: str = "config.lora.base") -> Any:
    try:
        import qwix  # it takes a second, and few need it
    except ImportError:
        raise UserError(
            f"{field}: to hold a model in 8 or 4 bits needs qwix; "
            "python -m pip install 'jaxllm[quantised]', or qwix alone."
        ) from None
    return qwix
