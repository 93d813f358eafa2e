"""Memory that is freed is kept where the C library can be told so."""

import ctypes
import os
import subprocess
import sys

import pytest

from jaxllm.host_memory import computes_on_cpu

# Page faults of taking and freeing 64 MiB four times more, in MiB.
PROGRAM = """
import ctypes, resource, sys
from jaxllm.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
library, size = ctypes.CDLL(None), ctypes.c_size_t(2**26)
library.malloc.restype = ctypes.c_void_p

def use():
    block = ctypes.c_void_p(library.malloc(size))
    library.memset(block, 1, size)
    library.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / 2**20)
"""


def touched_again(how):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    arguments = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or not sys.platform.startswith("linux"),
    reason="the C library is not glibc",
)
def test_freed_memory_is_used_again():
    assert touched_again("kept") < 16
    assert touched_again("given back") > 192  # else the line above shows nothing


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["xla_cuda12"], True),
        ("cuda,cpu", [], False),
        ("", [], True),
        ("", ["xla_cuda12"], False),
    ],
)
def test_memory_is_kept_only_where_the_cpu_computes(platforms, plugins, expected, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr("jaxllm.host_memory.entry_points", lambda group: plugins)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert computes_on_cpu() is expected
