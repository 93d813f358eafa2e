"""Memory that is freed is kept where the CPU computes and the C library can be told so."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from jaxllm import host_memory
from jaxllm.errors import UserError
from jaxllm.host_memory import keep_freed_memory_on_cpu
from jaxllm.sharding.mesh import MeshConfig
from jaxllm.stages import pretrain

# Page faults of taking and freeing 64 MiB four times more, in MiB. 41 is PR_SET_THP_DISABLE: with
# large pages there would be few.
PROGRAM = """
import ctypes, resource, sys
from jaxllm.host_memory import keep_freed_memory_on_cpu

library, size = ctypes.CDLL(None), ctypes.c_size_t(2**26)
library.prctl(41, 1, 0, 0, 0)
if sys.argv[1] == "kept":
    assert keep_freed_memory_on_cpu()
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


GIVEN_BACK = """
import ctypes, resource
from jaxllm.host_memory import give_back_freed_memory, keep_freed_memory_on_cpu

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

library, size = ctypes.CDLL(None), ctypes.c_size_t(2**26)
library.malloc.restype = ctypes.c_void_p
assert keep_freed_memory_on_cpu()
block = ctypes.c_void_p(library.malloc(size))
library.memset(block, 1, size)
library.free(block)
before = held()
give_back_freed_memory()
print(before - held())
"""


def touched_again(how):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    arguments = [sys.executable, "-c", PROGRAM, how]
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="the C library has no malloc_trim",
)
def test_freed_memory_is_given_back_once_when_asked():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) > 60


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="the C library has no mallopt",
)
def test_freed_memory_is_used_again():
    assert touched_again("kept") < 16
    assert touched_again("given back") > 192  # else the line above shows nothing


@pytest.fixture
def settings(monkeypatch):
    """What mallopt is asked for, of a C library that grants everything."""
    asked = []
    library = SimpleNamespace(mallopt=lambda *setting: asked.append(setting) or 1)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    for name in host_memory._SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "expected"),
    [
        ("cpu", ["xla_cuda12"], True, True),
        ("cuda,cpu", [], False, False),
        ("", [], False, True),
        ("", ["xla_cuda12"], False, False),
        ("", [], True, False),
    ],
)
def test_only_where_the_cpu_computes(platforms, plugins, libtpu, expected, monkeypatch, settings):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(host_memory, "entry_points", lambda group: plugins)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: libtpu or None)
    assert keep_freed_memory_on_cpu() is expected
    assert bool(settings) is expected


def test_what_the_user_has_set_stays(monkeypatch, settings):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not keep_freed_memory_on_cpu()
    assert not settings


def test_training_keeps_freed_memory(monkeypatch, settings, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="does not fit"):
        pretrain.run(pretrain.PretrainConfig(mesh=MeshConfig(fsdp=7)), tmp_path / "run")
    assert settings


@pytest.fixture
def large_block():
    """64 MiB of `malloc`'s, and what frees them."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("this C library does not tell what is allocated")
    library.malloc.restype = ctypes.c_void_p
    held = [ctypes.c_void_p(library.malloc(ctypes.c_size_t(2**26)))]

    def free():
        while held:
            library.free(held.pop())

    yield free
    free()


def test_the_wait_ends_once_another_thread_has_freed(large_block, monkeypatch):
    monkeypatch.setattr(host_memory, "_LONGEST", 60.0)  # the thread may be late
    allocated = host_memory.allocated_bytes()
    assert allocated >= 2**26
    threading.Timer(0.03, large_block).start()
    begun = time.monotonic()
    assert host_memory.wait_until_freed(allocated - 2**25) <= allocated - 2**25
    assert time.monotonic() - begun >= 0.03


def test_the_wait_for_what_is_never_freed_ends_too(large_block):
    begun = time.monotonic()
    host_memory.wait_until_freed(host_memory.allocated_bytes() - 2**25)
    assert 0.1 <= time.monotonic() - begun < 10


def test_where_nothing_tells_the_wait_is_short(monkeypatch):
    slept = []
    monkeypatch.setattr(host_memory, "_mallinfo", lambda: None)
    monkeypatch.setattr(host_memory.time, "sleep", slept.append)
    assert host_memory.allocated_bytes() == 0
    assert host_memory.wait_until_freed(0) == 0
    assert slept == [0.002]
