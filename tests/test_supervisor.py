"""The group of a command, and the parent that turns whatever ends its child into an exit code."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from jaxllm.errors import UserError
from jaxllm.supervisor import ProcessGroup, process_group

GROUP = ["--coordinator=host:1234", "--processes=4", "--process=3"]


def test_flags_make_a_group_and_the_rest_is_left():
    group, rest = process_group(["--config=a.py", *GROUP, "--config.steps=3"], {})
    assert group == ProcessGroup("host:1234", 4, 3)
    assert rest == ["--config=a.py", "--config.steps=3"]


@pytest.mark.parametrize(
    ("arguments", "environment", "group"),
    [
        ([], {}, None),
        (["--processes=auto"], {}, ProcessGroup()),
        (["--coordinator=h:1", "--processes=1", "--process=0"], {}, None),
        ([], {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, ProcessGroup()),
        ([], {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ([], {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in sbatch, outside of srun
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, ProcessGroup()),
        ([], {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ([], {"MEGASCALE_NUM_SLICES": "2"}, ProcessGroup()),
    ],
)
def test_a_group_is_told_from_its_surroundings(arguments, environment, group):
    assert process_group(arguments, environment) == (group, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GROUP[:2], "--process is missing"),
        (["--processes=2"], "--coordinator, --process is missing"),
        ([*GROUP[:2], "--process=4"], "--process=4: must be at least 0 and below --processes=4"),
        ([*GROUP[:2], "--process=x"], "--process=x: must be a number"),
        (["--coordinator=host", *GROUP[1:]], "--coordinator=host: must be HOST:PORT"),
    ],
)
def test_wrong_flags_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        process_group(arguments, {})


def _supervised(child, **options):
    """A process whose child runs some lines; `supervisor` is its way to its parent."""
    script = (
        "import os, signal, sys, time\n"
        "from jaxllm.supervisor import Supervisor, supervise\n"
        "supervisor = supervise()\n"
        "if isinstance(supervisor, int):\n"
        "    sys.exit(supervisor)\n"
    ) + textwrap.dedent(child)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_an_exit_code_is_passed_on(code):
    process = _supervised(f"print('hello'); sys.exit({code})")
    assert process.communicate(timeout=60) == ("hello\n", "")
    assert process.returncode == code


def test_a_child_that_a_signal_ends_is_told_as_shells_do():
    process = _supervised("os.kill(os.getpid(), signal.SIGKILL)")
    assert process.communicate(timeout=60)[1] == "jaxllm: ended by SIGKILL\n"
    assert process.returncode == 137


def test_a_child_that_jax_aborts_since_the_coordinator_is_gone_is_to_be_run_again(closed_port):
    process = _supervised(f"supervisor.coordinated_at('127.0.0.1:{closed_port}'); os.abort()")
    message = process.communicate(timeout=60)[1]
    assert f"process 0, which coordinated the others at 127.0.0.1:{closed_port}, is gone" in message
    assert process.returncode == 75


def test_a_coordinator_that_is_there_and_does_not_answer_is_told_too():
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        port = coordinator.getsockname()[1]
        process = _supervised(f"supervisor.coordinated_at('127.0.0.1:{port}'); os.abort()")
        assert f"127.0.0.1:{port}, does not answer" in process.communicate(timeout=60)[1]
    assert process.returncode == 75


def test_what_ends_a_child_before_all_have_come_is_told():
    process = _supervised("supervisor.joining(); os.abort()")
    assert "the processes did not find together" in process.communicate(timeout=60)[1]
    assert process.returncode == 75


def test_an_abort_that_has_to_do_with_no_other_process_is_passed_on():
    process = _supervised("os.abort()")
    assert process.communicate(timeout=60)[1] == "jaxllm: ended by SIGABRT\n"
    assert process.returncode == 134


def test_what_ends_a_child_after_its_work_changes_nothing():
    process = _supervised("supervisor.ended(0); os.abort()")
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once(number):
    process = _supervised(
        """
        came = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: came.append(number))
        print("ready", flush=True)
        while not came:
            time.sleep(0.01)
        time.sleep(0.3)
        print(len(came), signal.Signals(came[0]).name)
        """,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60)[0] == f"1 {number.name}\n"
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it")
def test_a_child_does_not_outlive_its_parent():
    process = _supervised("print(os.getpid(), flush=True); time.sleep(300)")
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
