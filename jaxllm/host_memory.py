"""The C library's allocator, set for the steps of training on a CPU.

XLA takes the temporaries of a step, hundreds of megabytes, from `malloc`, and gives them back at
its end. glibc hands such blocks to the system at once, which has to zero every page of them again
for the next step (docs/performance.md).
"""

import ctypes
import importlib.util
import os
from importlib.metadata import entry_points

# Parameters of mallopt, from glibc's malloc.h, and what they are set to: no block is mapped apart
# from the heap, which is one for all threads and never shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
# By which users set the same themselves.
_SET_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")


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


def _computes_on_cpu() -> bool:
    """Whether JAX is told to compute on the CPU, or is installed for nothing else."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
