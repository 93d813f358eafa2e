"""A guard against slow growth: what a step costs, and how often a run compiles.

A fixed small step is compiled with XLA's optimisations on, in a process of its own, and its cost
by XLA's own account may not exceed what it was by more than 5 %. When it falls, lower the figure.
(XLA counts the body of a loop once, however often it runs: writing a loop out raises the figures.)
"""

import json
import os
import subprocess
import sys

import jax
import pytest

# By version of JAX: another compiler counts otherwise, and is not compared.
COST = {
    "0.10.2": {"flops": 4.266e9, "bytes accessed": 6.301e8, "temporary bytes": 7.417e7},
}
COMPILATIONS = 14
TOLERANCE = 1.05

STEP = """
import json
import jax
from benchmarks.memory import compiled_step
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.sharding.mesh import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(), jax.devices()[:1])
model = architecture(ModelConfig(layers=4, width=128, heads=4, kv_heads=2), 1024)
compiled = compiled_step(model, batch=8, seq=256, mesh=mesh)
cost = compiled.cost_analysis()
print(json.dumps({
    "flops": cost["flops"],
    "bytes accessed": cost["bytes accessed"],
    "temporary bytes": compiled.memory_analysis().temp_size_in_bytes,
}))
"""

RUN = """
import json, sys
import jax
from jaxllm.main import main

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(seconds) if "backend_compile" in name else None
)
code = main(sys.argv[1:])
print(json.dumps({"code": code, "compilations": len(compiled)}))
"""


def answer(program, *arguments):
    """What a program prints last, run on one device with XLA's optimisations on."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    }
    # The same instructions whatever processor compiles.
    environment["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX2"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(jax.__version__ not in COST, reason="cost is known for other versions of JAX")
def test_a_step_costs_no_more_than_it_did():
    found = answer(STEP)
    known = COST[jax.__version__]
    grown = {name for name in known if found[name] > TOLERANCE * known[name]}
    assert not grown, f"{grown} of {found} grew beyond {known}"
    # A figure that is far too high guards nothing.
    assert all(found[name] > 0.8 * known[name] for name in known), found


def test_a_run_compiles_no_more_programs_than_it_did(tmp_path):
    arguments = ["--config=configs/pretrain.py:tiny", f"--workdir={tmp_path / 'run'}"]
    found = answer(RUN, *arguments)
    assert found["code"] == 0
    assert 0.8 * COMPILATIONS < found["compilations"] <= TOLERANCE * COMPILATIONS
