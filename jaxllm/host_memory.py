"""The C library's allocator, set for training on a CPU.

XLA takes the temporaries of a step, hundreds of megabytes, from `malloc`, and gives them back at
its end. glibc hands such blocks to the system at once, which has to zero every page of them again
for the next step: a twelfth of the time of a step (docs/performance.md).
"""

import ctypes
import importlib.util
import os
from importlib.metadata import entry_points

# Parameters of mallopt, from glibc's malloc.h, and what they are set to: no block is mapped apart
# from the heap, which is one for all threads and never shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, to use it again; True if that could be set.

    It has to be called before JAX begins its threads. Nothing is done without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(*setting) for setting in _KEPT.items())


def computes_on_cpu() -> bool:
    """Whether JAX is told to compute on the CPU, or is installed for nothing else."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
