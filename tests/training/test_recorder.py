"""Where scalars go: the metrics file, TensorBoard, and Weights & Biases where it is installed."""

import errno
import resource
import signal
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.training.recorder import LogConfig, Recorder


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def _events(run):
    """The scalars of TensorBoard's files as (name, step, value), in the order of writing.

    A record is its length (8 bytes), a checksum (4), the event, and another checksum (4).
    """
    found = []
    for path in sorted(run.tensorboard.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            if len(data) < 16 + size:  # what a full disk left of a record
                break
            event = Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_scalars_reach_the_metrics_file_and_tensorboard(run):
    recorder = Recorder(run, 0, LogConfig(), {})
    recorder.record(1, 0.5, {"train/loss": 2.0})
    recorder.record(2, 0.6, {"train/loss": 1.5, "train/grad_norm": 0.25})
    recorder.close()
    assert recorder.history() == [
        {"step": 1, "time": 0.5, "train/loss": 2.0},
        {"step": 2, "time": 0.6, "train/loss": 1.5, "train/grad_norm": 0.25},
    ]
    assert _events(run) == [
        ("train/loss", 1, 2.0),
        ("train/loss", 2, 1.5),
        ("train/grad_norm", 2, 0.25),
    ]


def test_what_came_after_the_restored_step_is_dropped(run):
    first = Recorder(run, 0, LogConfig(), {})
    for step in (1, 2, 3):
        first.record(step, 0.5, {"train/loss": 1.0})
    first.close()
    second = Recorder(run, 2, LogConfig(), {})
    assert [line["step"] for line in second.history()] == [1, 2]
    second.record(3, 1.0, {"train/loss": 0.5})
    second.close()
    assert [line["train/loss"] for line in second.history()] == [1.0, 1.0, 0.5]


def test_lines_that_waited_for_room_are_there_when_the_run_ends(run, monkeypatch):
    recorder = Recorder(run, 0, LogConfig(), {})
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", _no_room)
        recorder.record(1, 0.5, {"train/loss": 1.0})
    assert recorder.history() == []
    recorder.close()
    assert [line["step"] for line in recorder.history()] == [1]


def _no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("from_the_beginning", [False, True])
def test_a_full_disk_neither_ends_nor_stops_the_run(run, monkeypatch, from_the_beginning):
    """TensorBoard's files, which are read up to what is broken, go on in another one."""
    monkeypatch.setattr("jaxllm.reporting.event_file._FLUSH_SECONDS", 0.0)
    recorder = Recorder(run, 0, LogConfig(), {})
    if not from_the_beginning:
        recorder.record(1, 0.5, {"train/loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 if from_the_beginning else 150, hard))
        for step in range(2, 50):
            recorder.record(step, 0.5, {f"train/{n}": float(step) for n in range(12)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    recorder.record(50, 0.5, {"train/loss": 50.0})
    recorder.close()
    assert [line["step"] for line in recorder.history()] == [
        *([] if from_the_beginning else [1]),
        *range(2, 51),
    ]
    assert _events(run)[-1] == ("train/loss", 50, 50.0)
    if not from_the_beginning:
        assert _events(run)[0] == ("train/loss", 1, 1.0)


def test_weights_and_biases_that_is_not_installed_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.log\.wandb: .* pip install 'jaxllm\[wandb\]'"):
        Recorder(run, 0, LogConfig(wandb="project"), {})


def test_weights_and_biases_gets_every_scalar_under_a_stable_name(run, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")

    class WandbRun:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append((options["project"], options["id"], options["resume"], options["config"]))
        return WandbRun()

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recorder = Recorder(run, 0, LogConfig(wandb="project"), {"seed": 3})
    recorder.record(1, 0.5, {"train/loss": 2.0})
    recorder.close()
    (project, identity, *rest), *logged = calls
    assert (project, rest) == ("project", ["allow", {"seed": 3}])
    assert logged == [(1, {"train/loss": 2.0}), "finish"]
    # The same run again has the same name; one of the same folder name elsewhere has another.
    calls.clear()
    Recorder(run, 0, LogConfig(wandb="project"), {}).close()
    elsewhere = RunDirectory(run.path / run.path.name)
    elsewhere.path.mkdir()
    Recorder(elsewhere, 0, LogConfig(wandb="project"), {}).close()
    assert calls[0][1] == identity != calls[2][1]


@pytest.mark.parametrize("fields", [{"every": 0}, {"peak_tflops": -1.0}])
def test_the_configuration_is_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LogConfig(**fields)
