"""The C library's allocator, set for the steps of training on a CPU.

XLA takes the temporaries of a step, hundreds of megabytes, from `malloc`, and gives them back at
its end. glibc hands such blocks to the system at once, which has to zero every page of them again
for the next step (docs/performance.md).
"""

import ctypes
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from importlib.metadata import entry_points

# Parameters of mallopt, from glibc's malloc.h, and what they are set to: no block is mapped apart
# from the heap, which is one for all threads and never shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
# By which users set the same themselves.
_SET_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")

# Seconds: the longest wait for memory to be freed, between two looks, and where nothing tells.
_LONGEST, _BETWEEN, _UNTOLD = 0.1, 2e-4, 0.002


def keep_freed_memory_on_cpu() -> bool:
    """Where the CPU computes, lets the process keep the memory that it frees, to use it again.

    To be called by what makes steps, before JAX begins its threads. Threads that allocate much at
    the same time then wait for each other: tokenising is slower. Nothing is done without glibc, or
    where an environment variable sets the same.

    Returns:
        Whether it was set.
    """
    if os.name != "posix" or any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not _computes_on_cpu():
        return False
    return all(mallopt(*setting) for setting in _KEPT.items())


def give_back_freed_memory() -> None:
    """Lets the system have the memory that is free now, once: what compiling took, which steps have
    no use for. Nothing is done without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def allocated_bytes() -> int:
    """Bytes that this process has taken from glibc's `malloc` and not freed; 0 where that, or a
    version of it before 2.33, does not tell."""
    told = _mallinfo()
    if told is None:
        return 0
    info = told()
    return int(info.uordblks + info.hblkhd)


def wait_until_freed(allocated: int) -> int:
    """Waits until `allocated_bytes()` is at most `allocated`, and returns it.

    It waits a tenth of a second at the most, since others may have taken memory meanwhile; two
    milliseconds where nothing tells.
    """
    if _mallinfo() is None:
        time.sleep(_UNTOLD)
        return 0
    deadline = time.monotonic() + _LONGEST
    while (now := allocated_bytes()) > allocated and time.monotonic() < deadline:
        time.sleep(_BETWEEN)
    return now


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo2] | None:
    """glibc's `mallinfo2`; None where there is none."""
    told = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if told is not None:
        told.restype = _Mallinfo2
    return told


def _computes_on_cpu() -> bool:
    """Whether JAX is told to compute on the CPU, or is installed for nothing else."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
