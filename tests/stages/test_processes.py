"""Real processes on loopback: they train, evaluate and write as one would, and fail together."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

# Enough steps to be killed among them.
FIELDS = {"steps": 500, "checkpoint.every": 100, "eval.every": 250}

_GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
)


class Processes:
    """Processes that run one command together; `timeout` seconds at most, and killed then."""

    def __init__(self, commands, folder, devices):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "NPROC": "16",
        }
        self._files = [
            [(folder / f"process_{number}.{stream}").open("w+b") for stream in ("err", "out")]
            for number in range(len(commands))
        ]
        self.running = [
            subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environment)
            for command, (err, out) in zip(commands, self._files, strict=True)
        ]

    def wait(self, seconds=150):
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.running]
        finally:
            self.kill()

    def kill(self):
        for process in self.running:
            if process.poll() is None:
                process.kill()  # its child ends with it
                process.wait()

    def worker(self, index):
        """The process id of the one that works, the child of the one that was started."""
        pid = self.running[index].pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return int(file.read().split()[0])

    def output(self, index):
        return "".join(self.streams(index))

    def streams(self, index):
        """What was written to standard error, and to standard output."""
        for file in self._files[index]:
            file.seek(0)
        return [file.read().decode() for file in self._files[index]]


@pytest.fixture
def start(tmp_path):
    """Starts the same command in several processes; a single one is started plainly."""
    started = []

    def begin(arguments, count, devices=1, program=("-m", "jaxllm.main")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        group = [f"--coordinator={address}", f"--processes={count}"]
        commands = [
            [*program, *arguments, *(group if count > 1 else [])]
            + ([f"--process={index}"] if count > 1 else [])
            for index in range(count)
        ]
        started.append(Processes(commands, tmp_path, devices))
        return started[-1]

    yield begin
    for processes in started:
        processes.kill()


def _curve(workdir):
    """Every scalar of training and evaluation, by step and name."""
    names = ("train/loss", "train/grad_norm", "eval/loss")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def _assert_same_curve(one, other):
    one, other = _curve(one), _curve(other)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), [other[key] for key in one], rtol=1e-4)


def _wait_for(path, processes, seconds=100):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, processes.output(0)
        assert all(process.poll() is None for process in processes.running), processes.output(0)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(arguments, compiled, tmp_path_factory):
    """What one process with one device makes of it."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jaxllm.main", *arguments("pretrain", workdir, FIELDS)]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=150)
    return workdir


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
    arguments, start, alone, tmp_path, count, devices, fields
):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, FIELDS | fields), count, devices)
    assert processes.wait() == [0] * count, processes.output(0)
    _assert_same_curve(alone, workdir)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    for index in range(1, count):  # only process 0 writes text
        # XLA and Gloo have a log of their own in every process; Gloo's threads cut up each other's.
        errors, output = processes.streams(index)
        assert [line for line in errors.splitlines() if not re.match(r"[IWE]\d{4} ", line)] == []
        assert re.sub(_GLOO, "", output).strip("0123456789 \n") == ""
    again = start(arguments("pretrain", workdir, FIELDS | fields), count, devices)
    assert again.wait() == [0] * count
    assert "the run is finished" in again.output(0)


FINE_TUNING = {
    "steps": 24,
    "batch_size": 8,
    "data.seq_len": 32,
    "log.every": 1,
    "checkpoint.every": 8,
    "eval.every": 8,
    "max_new_tokens": 4,
    "optimizer.learning_rate": 0.01,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"lora.rank": 2, "lora.dropout": 0.1},
        pytest.param({"sft.layout": "chat", "mesh.fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_fine_tune_as_one_does_and_go_on_after_a_fault(
    arguments, start, finished_run, compiled, tmp_path, fields
):
    data = tmp_path / "instructions.jsonl"
    records = ({"prompt": f"Say {n}", "response": f"yes {n}"} for n in range(80))
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = {"init": finished_run, "data.train": data, **FINE_TUNING, **fields}
    given |= {"data.eval_fraction": 0.2}
    one, two, halved = (tmp_path / name for name in ("one", "two", "halved"))
    alone = start(arguments("sft", one, given | {"mesh.fsdp": 1}), 1)
    assert alone.wait() == [0], alone.output(0)
    together = start(arguments("sft", two, given), 2)
    assert together.wait() == [0, 0], together.output(0)
    _assert_same_curve(one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}

    killed = start(arguments("sft", halved, given | {"steps": 2000}), 2)
    _wait_for(halved / "checkpoints" / "8", killed)
    os.kill(killed.worker(1), signal.SIGKILL)
    codes = killed.wait()
    assert codes[0] == 75, killed.output(0)
    saved = [int(path.name) for path in (halved / "checkpoints").iterdir() if path.name.isdigit()]
    steps = {"steps": max(saved) + 8, "mesh.fsdp": 1}
    resumed = start(arguments("sft", halved, given | steps), 1)
    assert resumed.wait() == [0], resumed.output(0)
    assert "going on from step" in resumed.output(0)


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


@pytest.mark.parametrize(
    ("count", "lost"),
    [(2, 1), *(pytest.param(*which, marks=pytest.mark.slow) for which in ((2, 0), (4, 2)))],
)
def test_a_killed_process_ends_the_others_and_half_of_them_go_on(
    arguments, start, alone, tmp_path, count, lost
):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, FIELDS), count)
    _wait_for(workdir / "checkpoints" / "100", processes)
    os.kill(processes.worker(lost), signal.SIGKILL)
    begin = time.monotonic()
    assert processes.wait() == [137 if index == lost else 75 for index in range(count)]
    assert time.monotonic() - begin < 60
    for index in {*range(count)} - {lost}:
        told = processes.output(index)
        assert f"process {lost}" in told
        assert "gone" in told
    half = count // 2
    again = start(arguments("pretrain", workdir, FIELDS), half)
    assert again.wait() == [0] * half
    assert "going on from step" in again.output(0)
    _assert_same_curve(alone, workdir)


def test_a_signal_to_one_process_stops_all_after_the_same_step(arguments, start, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start(arguments("pretrain", workdir, FIELDS), 2)
    _wait_for(workdir / "checkpoints" / "100", processes)
    processes.running[1].terminate()
    assert processes.wait() == [75, 75], processes.output(0)
    (told,) = [line for line in processes.output(0).splitlines() if "stopped by" in line]
    assert "which is saved" in told
    step = int(told.split("after step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert max(step for step, _ in _curve(workdir)) == step
    assert start(arguments("pretrain", workdir, FIELDS), 2).wait() == [0, 0]
    _assert_same_curve(alone, workdir)


def test_a_damaged_checkpoint_is_set_aside_by_all_and_the_one_before_is_used(
    arguments, start, finished_run, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    (workdir / "report.html").unlink()  # not finished
    damaged = next((workdir / "checkpoints" / "12" / "params").rglob("d/*"))
    damaged.write_bytes(b"x")
    processes = start(arguments("pretrain", workdir), 2)
    assert processes.wait() == [0, 0]
    assert "has 1 bytes" in processes.output(0)
    assert "going on from step 8 of 12" in processes.output(0)
    assert (workdir / "checkpoints" / "broken-12").is_dir()
    assert _curve(workdir) == pytest.approx(_curve(finished_run), rel=1e-4)

    for path in (workdir / "checkpoints").glob("[0-9]*/params/manifest.ocdbt"):
        path.unlink()
    (workdir / "report.html").unlink()
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    processes = start(arguments("pretrain", workdir), 2)
    assert processes.wait() == [2, 2]
    assert "none of its checkpoints can be read" in processes.output(0)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


_FAULTY = """
import sys
from jaxllm.data import batches
from jaxllm.main import main

made = batches.BatchSource._make

def make(self, step):
    if "--process=1" in sys.argv and step == 120:
        raise RuntimeError("a fault of process 1 alone")
    return made(self, step)

batches.BatchSource._make = make
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_in_one_process_ends_all_though_there_are_checkpoints(arguments, start, tmp_path):
    workdir = tmp_path / "run"
    fields = FIELDS | {"checkpoint.every": 50}
    processes = start(arguments("pretrain", workdir, fields), 2, program=("-c", _FAULTY))
    assert processes.wait(60) == [1, 1]
    assert (workdir / "checkpoints" / "100").is_dir()
    assert "RuntimeError: a fault of process 1 alone" in processes.output(1)
    assert "process 1 on" in processes.output(0)
    assert "ended with code 1" in processes.output(0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_is_full_for_one_process_ends_all_to_go_on(
    arguments, start, alone, tmp_path, limited
):
    workdir = tmp_path / "run"
    # Larger than what the processes print, which their limit counts too.
    fields = FIELDS | {"model.width": 128, "log.watchdog": 30}
    processes = start(arguments("pretrain", workdir, fields), 2)
    _wait_for(workdir / "checkpoints" / "100", processes)
    worker = processes.worker(limited)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    assert processes.wait(60) == [75, 75]
    assert "could not be written" in processes.output(limited)
    assert "Traceback" not in processes.output(0) + processes.output(1)
    assert f"process {limited}" in processes.output(1 - limited)
    assert start(arguments("pretrain", workdir, fields), 2).wait() == [0, 0]


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


def test_models_write_and_are_measured_by_several_processes(
    arguments, start, finished_run, corpus, tmp_path
):
    written = {}
    for count in (1, 2):
        fields = {"init": finished_run, "prompt": "ab", "temperature": 0.0, "max_new_tokens": 16}
        processes = start(arguments("generate", None, fields), count)
        assert processes.wait() == [0] * count, processes.output(0)
        written[count] = processes.output(0).splitlines()[-1]
        workdir = tmp_path / f"scores_{count}"
        fields = {"init": finished_run, "data.eval": corpus, "tasks": _task(tmp_path)}
        processes = start(arguments("evaluate", workdir, fields), count)
        assert processes.wait() == [0] * count, processes.output(0)
        written[count] += (workdir / "items.jsonl").read_text()
        written[f"{count} scores"] = json.loads((workdir / "summary.json").read_text())
    assert written[1] == written[2]
    assert written["1 scores"] == pytest.approx(written["2 scores"], rel=1e-5)


def _task(folder):
    path = folder / "task.jsonl"
    items = [
        {"query": word, "choices": ["ab", "cde"], "gold": number % 2}
        for number, word in enumerate(("abc", "d e", "fgh ij"))
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_stages_that_are_for_one_process(arguments, start, finished_run, tmp_path):
    fields = {"init": finished_run}
    processes = start(arguments("export_hf", tmp_path / "out", fields), 2)
    assert processes.wait() == [2, 2]
    assert "runs as a single process" in processes.output(0)
    processes = start(arguments("prepare", tmp_path / "prepared"), 2)
    assert processes.wait() == [0, 0]
    assert (tmp_path / "prepared" / "report.html").exists()
