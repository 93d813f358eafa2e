"""Attention: one function, with named backends that all honour the same arguments.

Which key a query may see follows from positions and segments alone (`visibility.py`). That covers
causal training, packed documents (positions restart with each segment), padding (segment 0),
prefixes, sliding windows and decoding from a cache. A backend that cannot honour an argument
refuses it by name; docs/attention.md has the table.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from jaxllm.errors import UserError
from jaxllm.ops.attention import chunked, cudnn, pallas, splash, xla
from jaxllm.ops.attention.kernels import interpreting
from jaxllm.ops.attention.visibility import Places, Rule


@dataclasses.dataclass(frozen=True)
class Features:
    """What a call asks for; whether keys are in order, and `seq`, show only with arrays."""

    causal: bool
    window: int
    soft_cap: float
    prefix: bool
    head_dim: int
    value_dim: int
    platform: str
    in_order: bool = True
    dtype: str = ""
    seq: int = 0
    capability: str = ""
    """Of the GPU: two numbers from NVIDIA, as 9.0, other words from others; empty: unknown."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way of computing attention."""

    attend: Callable[[Array, Array, Array, Places, Rule], Array]
    lacks: Callable[[Features], str]
    """Which of the features it cannot honour, in words; empty: none."""
    platforms: tuple[str, ...] = ()
    """Where it runs; empty: everywhere."""
    module: str = ""
    """The module of JAX that it needs, where that is experimental."""


def _lacks_of_cudnn(features: Features) -> str:
    if features.soft_cap:
        return "cap scores (soft_cap)"
    if features.value_dim != features.head_dim:
        return f"have values of width {features.value_dim} with keys of {features.head_dim}"
    capability = features.capability
    if capability and not capability[0].isdigit():
        return f"run on a GPU of another maker than NVIDIA ({capability})"
    widest = 128 if capability and float(capability) < 9 else 256
    if features.head_dim % 8 or features.head_dim > widest:
        return (
            f"have heads of width {features.head_dim} (a multiple of 8 up to 256, or to 128 "
            "below compute capability 9.0)"
        )
    if features.dtype not in ("", "bfloat16", "float16"):
        return f"compute in {features.dtype} (bfloat16 and float16)"
    return f"have an odd row of {features.seq} tokens" if features.seq % 2 else ""


def _lacks_of_pallas(features: Features) -> str:
    if features.window:
        return "limit attention to a window"
    if features.soft_cap:
        return "cap scores (soft_cap)"
    if features.prefix:
        return "show a prefix to all of its segment"
    if features.value_dim != features.head_dim:
        return f"have values of width {features.value_dim} with keys of {features.head_dim}"
    if features.head_dim < 16:
        return f"have heads of width {features.head_dim} (16 or more)"
    return "" if features.in_order else "attend to keys other than the row itself (a cache)"


def _lacks_of_splash(features: Features) -> str:
    if features.prefix:
        return "show a prefix to all of its segment"
    return "" if features.in_order else "attend to keys other than the row itself (a cache)"


_GPU = ("gpu", "cuda")
_TABLE = {
    "xla": Backend(xla.attend, lacks=lambda features: ""),
    "chunked": Backend(chunked.attend, lacks=lambda features: ""),
    "cudnn": Backend(cudnn.attend, _lacks_of_cudnn, _GPU),
    "pallas": Backend(pallas.attend, _lacks_of_pallas, _GPU, pallas.MODULE),
    "splash": Backend(splash.attend, _lacks_of_splash, ("tpu",), splash.MODULE),
}
BACKENDS = ("auto", *_TABLE)
"""The names of all backends; `auto` takes the fastest that can."""


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    query_positions: Int[Array, "batch seq"],
    key_positions: Int[Array, "batch keys"],
    query_segment_ids: Int[Array, "batch seq"],
    key_segment_ids: Int[Array, "batch keys"],
    prefix: Int[Array, "batch seq"] | None = None,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    scale: float | None = None,
    in_order: bool = False,
    backend: str = "xla",
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention within segments, softmax(scale · q kᵀ) v.

    Grouped heads: query head h reads key head h // (heads / kv_heads). Products are in the dtype
    of the inputs and accumulate in float32, softmax is float32, and the result has the dtype of
    `query`. A query that sees nothing has a finite result without meaning.

    Args:
        query, key, value: projected and rotated inputs; `kv_heads` divides `heads`.
        query_positions, key_positions: a query sees keys at positions up to its own.
        query_segment_ids, key_segment_ids: a query sees keys of its own segment only.
        prefix: for each query, how many positions at the beginning of its segment it sees
            whatever its own position (prefix language models, bidirectional over the prompt).
        causal: whether keys at later positions are hidden.
        window: a query sees keys at distances below this, itself included; 0: at any distance.
        soft_cap: scores become soft_cap · tanh(scores / soft_cap) before masking; 0: they stay.
        scale: factor of q kᵀ; None: 1 / √head_dim.
        in_order: the promise that keys are the row of the queries itself (the same positions and
            segments), that segments are contiguous, and that positions rise by one in each. Some
            backends need it, the others are faster with it.
        backend: one of `BACKENDS`.

    Raises:
        UserError: the backend cannot honour what is asked for.
    """
    features = Features(
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        prefix=prefix is not None,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        platform=jax.default_backend(),
        in_order=in_order,
        dtype=str(query.dtype),
        seq=query.shape[1],
        capability=_capability(),
    )
    if backend == "auto":
        backend = _fastest(features)
    _refuse(backend, features)
    places = Places(query_positions, key_positions, query_segment_ids, key_segment_ids, prefix)
    rule = Rule(
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        in_order=in_order,
    )
    return _TABLE[backend].attend(query, key, value, places, rule)


def check_backend(
    backend: str,
    *,
    causal: bool,
    window: int,
    soft_cap: float,
    prefix: bool,
    head_dim: int,
    value_dim: int,
    platform: str,
    dtype: str = "",
) -> None:
    """Checks before there are any arrays that a backend can honour what a model asks for.

    Raises:
        UserError: it is unknown, or cannot; the message says what it cannot and which can.
    """
    if backend == "auto":
        return
    features = Features(
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        prefix=prefix,
        head_dim=head_dim,
        value_dim=value_dim,
        platform=platform,
        dtype=dtype,
        capability=_capability(),
    )
    _refuse(backend, features)


def _refuse(backend: str, features: Features) -> None:
    if backend not in _TABLE:
        raise UserError(
            f"config.model.attention: {backend!r} is unknown; there are {', '.join(BACKENDS)}."
        )
    lack = _lack(backend, features)
    if lack:
        able = [name for name in _TABLE if not _lack(name, features)]
        raise UserError(
            f"config.model.attention: {backend} cannot {lack}; take {', '.join(able)} or auto."
        )


def _lack(backend: str, features: Features) -> str:
    """What hinders a backend, in words that follow "cannot"; empty: nothing."""
    row = _TABLE[backend]
    elsewhere = interpreting() and row.module  # kernels of Pallas can be interpreted anywhere
    if row.platforms and features.platform not in row.platforms and not elsewhere:
        return f"run on {features.platform} (only on {row.platforms[0]})"
    if row.module and not _exists(row.module):
        return f"run with jax {jax.__version__}, which has no {row.module}"
    return row.lacks(features)


def _capability() -> str:
    """The compute capability of this machine's GPU; empty where there is none."""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _fastest(features: Features) -> str:
    """The backend that is fastest by docs/attention.md among those that can."""
    if features.platform == "cpu":
        return "chunked" if features.in_order and features.seq >= 128 else "xla"
    if features.seq >= 128:  # below, a kernel has nothing to gain
        for kernel in ("splash", "cudnn"):
            if not _lack(kernel, features):
                return kernel
    # Scores of every pair are fast while they are few.
    return "chunked" if features.in_order and features.seq > 2048 else "xla"
