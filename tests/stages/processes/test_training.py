"""Several processes train as one does, each on its own rows, and refuse a run all alike."""

import json
import re
import socket
import subprocess
import sys

import pytest

_GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
)


@pytest.mark.parametrize(
    ("count", "devices", "fields"),
    [
        (2, 1, {}),
        pytest.param(2, 2, {"mesh.fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"mesh.fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(4, 2, {"mesh.tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_and_write_what_one_does(
    arguments, settings, start, alone, same_curve, tmp_path, count, devices, fields
):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, settings | fields), count, devices)
    assert processes.wait() == [0] * count, processes.output(0)
    same_curve(alone, workdir)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    for index in range(1, count):  # only process 0 writes text
        # XLA and Gloo have a log of their own in every process; Gloo's threads cut up each other's.
        errors, output = processes.streams(index)
        assert [line for line in errors.splitlines() if not re.match(r"[IWE]\d{4} ", line)] == []
        assert re.sub(_GLOO, "", output).strip("0123456789 \n") == ""
    again = start(arguments("pretrain", workdir, settings | fields), count, devices)
    assert again.wait() == [0] * count
    assert "the run is finished" in again.output(0)


_BATCHES = """
import json, os, sys
import jax, numpy as np
from jaxllm.data.batches import BatchSource
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.processes import Membership
from jaxllm.supervisor import process_group

built = []

class Rows:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        built.append(int(index))
        return {"tokens": np.full(3, index, np.int32)}

class Nobody:
    def joining(self): pass
    def coordinated_at(self, address): pass
    def ended(self, code): pass

group, (folder, fsdp) = process_group(sys.argv[1:], {})
if group is not None:
    member = Membership(Nobody())
    member.join(group)
mesh = make_mesh(MeshConfig(fsdp=int(fsdp)))
source = BatchSource(Rows(), 8, batch_sharding(mesh), prefetch=0)
held = {}
for step in (0, 5):
    for shard in source(step)["tokens"].addressable_shards:
        rows = range(8)[shard.index[0]]
        held |= {8 * step + row: np.asarray(shard.data)[n].tolist() for n, row in enumerate(rows)}
file = os.path.join(folder, f"{jax.process_index()}.json")
with open(file, "w") as out:
    json.dump({"held": held, "built": built}, out)
if group is not None:
    member.leave(0)
"""


@pytest.mark.parametrize(
    ("count", "devices"),
    [(2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2), (4, 1), (4, 2)))],
)
def test_each_process_builds_the_rows_of_its_devices_and_no_others(start, tmp_path, count, devices):
    processes = start([str(tmp_path), "2"], count, devices, program=("-c", _BATCHES))
    assert processes.wait() == [0] * count, processes.output(0)
    seen = []
    for index in range(count):
        of_process = json.loads((tmp_path / f"{index}.json").read_text())
        assert sorted(of_process["built"]) == sorted(map(int, of_process["held"]))
        assert of_process["held"] == {str(n): [n] * 3 for n in of_process["built"]}
        seen += of_process["built"]
    assert sorted(seen) == [*range(8), *range(40, 48)]


_SHARED = """
import os, sys
from pathlib import Path
from jaxllm.errors import UserError
from jaxllm.sharding.processes import Membership, check_shared, gathered, say
from jaxllm.supervisor import process_group

class Nobody:
    def joining(self): pass
    def coordinated_at(self, address): pass
    def ended(self, code): pass

group, (shared, folder) = process_group(sys.argv[1:], {})
member = Membership(Nobody())
member.join(group)
assert gathered(group.index) == [0, 1]
check_shared(Path(shared), "--workdir")
try:
    check_shared(Path(folder, str(group.index)), "--workdir")
except UserError as error:
    say(str(error))
    member.fail(2)
"""


def test_a_folder_that_not_all_processes_see_is_refused(start, tmp_path):
    for name in ("shared", "own/0", "own/1"):
        (tmp_path / name).mkdir(parents=True)
    where = [str(tmp_path / "shared"), str(tmp_path / "own")]
    processes = start(where, 2, program=("-c", _SHARED))
    assert processes.wait() == [2, 2]
    assert "process 1 does not see the folder of process 0" in processes.output(0)
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_port_that_is_taken_is_told(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = arguments("pretrain", tmp_path / "run")
        group = [f"--coordinator={address}", "--processes=2", "--process=0"]
        done = subprocess.run(
            [sys.executable, "-m", "jaxllm.main", *command, *group],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 2
    assert f"--coordinator={address}: process 0 cannot listen there" in done.stderr


def test_what_ends_one_process_ends_all_alike(arguments, start, tmp_path):
    processes = start(arguments("pretrain", tmp_path / "run", {"batch_size": 7}), 2)
    assert processes.wait() == [2, 2]
    assert "config.batch_size: 7 rows cannot be divided" in processes.output(0)
    # Only process 0 sees this one: the others wait for it.
    (tmp_path / "file").touch()
    processes = start(arguments("pretrain", tmp_path / "file"), 2)
    assert processes.wait() == [2, 2]
    assert "is a file; give a directory" in processes.output(0)
