"""The same batches and the same training curve on one device and over meshes of 2, 4 and 8.

    python experiments/meshes/run.py --workdir=runs/meshes

Trains `configs/pretrain.py:tiny` for 20 steps on simulated CPU devices, once for each mesh, and
prints how far each curve is from that of one device; exits with 1 if any step differs by more
than the tolerance. Two minutes on 2 CPU cores. The differences that are left come from the order
in which devices add float32 numbers.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from jaxllm.reporting.metrics_file import read_metrics
from jaxllm.reporting.tables import print_table

ROOT = Path(__file__).resolve().parents[2]

# Devices along data, fsdp, tensor.
MESHES = ((1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 4), (8, 1, 1), (1, 8, 1), (2, 2, 2))

SETTINGS = (
    "--config.steps=20",
    "--config.log.every=1",
    "--config.batch_size=8",
    "--config.model.heads=4",
    "--config.optimizer.name=adamw",
)


def curve(mesh: tuple[int, int, int], workdir: Path) -> dict[int, float]:
    """Trains over a mesh in a process of its own; returns the loss of each step."""
    data, fsdp, tensor = mesh
    run = workdir / f"data{data}_fsdp{fsdp}_tensor{tensor}"
    devices = data * fsdp * tensor
    command = [sys.executable, "-m", "jaxllm.main", "--config=configs/pretrain.py:tiny"]
    command += [f"--workdir={run}", f"--config.data.store={workdir / 'store'}", *SETTINGS]
    command += [
        f"--config.mesh.{a}={n}" for a, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    # Simulated devices share few cores: without NPROC their rendezvous can time out.
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"NPROC": "16", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = read_metrics(run / "metrics.jsonl")
    return {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}


def main() -> int:
    """Prints the table; 0 when every curve is that of one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="nats per token")
    options = parser.parse_args()
    curves = {mesh: curve(mesh, options.workdir) for mesh in MESHES}
    alone = curves[MESHES[0]]
    apart = {
        mesh: max(abs(losses[step] - alone[step]) for step in alone)
        for mesh, losses in curves.items()
    }
    rows = [
        (" x ".join(map(str, mesh)), f"{losses[1]:.5f}", f"{losses[20]:.5f}", f"{apart[mesh]:.1e}")
        for mesh, losses in curves.items()
    ]
    header = ("data x fsdp x tensor", "loss, step 1", "step 20", "largest difference")
    print_table(header, rows)
    return 0 if max(apart.values()) <= options.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
