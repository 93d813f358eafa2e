"""launch/local.sh: processes on this machine, run again after 75; a script stands for Python."""

import os
import shlex
import signal
import subprocess

import pytest

CONFIG = "--config=configs/pretrain.py"


@pytest.fixture
def local(run_script, fake_python):
    def run(*options, arguments=(CONFIG,), env=None):
        env = {"PYTHON": str(fake_python.path), **(env or {})}
        return run_script("local.sh", *options, "--", *arguments, env=env)

    return run


@pytest.fixture
def started(start_script, fake_python, eventually):
    """Starts the script, and waits until every process runs."""

    def start(processes, *options, arguments=(CONFIG,)):
        env = {"PYTHON": str(fake_python.path)}
        script = start_script("local.sh", "-n", str(processes), *options, "--", *arguments, env=env)
        eventually(lambda: all(fake_python.calls(process) for process in range(processes)))
        return script

    return start


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_is_called_as_by_hand(local, fake_python):
    fake_python.plan([0])
    arguments = [CONFIG, "--config.prompt=two words, $HOME and 'quotes'", "--workdir=a b"]
    done = local(arguments=arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = fake_python.calls()
    assert call["argv"] == ["-m", "jaxllm.main", *arguments]
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC"):
        assert name not in call["env"]


def test_several_processes_get_one_coordinator_and_a_number_each(local, fake_python):
    fake_python.plan([0], [0], [0])
    assert local("-n", "3").returncode == 0
    calls = [fake_python.calls(process) for process in range(3)]
    assert [len(lives) for lives in calls] == [1, 1, 1]
    flags = [life["argv"][-3:] for (life,) in calls]
    assert {flag[0] for flag in flags} == {flags[0][0]}
    address, _, port = flags[0][0].partition("=")[2].partition(":")
    assert address == "127.0.0.1"
    assert 1024 < int(port) < 65536
    assert [flag[1:] for flag in flags] == [["--processes=3", f"--process={i}"] for i in range(3)]


def test_devices_are_simulated_where_asked_for(local, fake_python):
    fake_python.plan([0], [0])
    assert local("-n", "2", "-d", "4", env={"XLA_FLAGS": "--xla_dump_to=x"}).returncode == 0
    for process in range(2):
        (call,) = fake_python.calls(process)
        assert call["env"]["XLA_FLAGS"] == (
            "--xla_dump_to=x --xla_force_host_platform_device_count=4"
        )
        assert call["env"]["JAX_PLATFORMS"] == "cpu"
        assert call["env"]["NPROC"] == "16"


def test_gpus_are_shared_equally(local, fake_python, recorded):
    recorded.program("nvidia-smi", "for i in range(4): print(f'GPU {i}: NVIDIA H100 (UUID: x)')")
    fake_python.plan([0], [0])
    assert local("-n", "2", env={"PATH": recorded.path}).returncode == 0
    given = [fake_python.calls(i)[0]["env"]["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert given == ["0,1", "2,3"]
    env = {"PATH": recorded.path, "CUDA_VISIBLE_DEVICES": "5,7"}
    assert local("-n", "2", env=env).returncode == 0
    given = [fake_python.calls(i)[1]["env"]["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert given == ["5", "7"]
    done = local("-n", "3", env={"PATH": recorded.path})
    assert done.returncode == 2
    assert "4 GPUs cannot be shared equally by -n 3 processes" in done.stderr
    # One process takes them all, as without the script.
    assert local(env={"PATH": recorded.path}).returncode == 0
    assert "CUDA_VISIBLE_DEVICES" not in fake_python.calls()[-1]["env"]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ((0, 0, 0), 0),
        ((0, 1, 0), 1),
        ((75, "sleep:0.5 2", 1), 2),
        (("sleep:0.5 1", 75, 0), 75),
        ((3, "sleep:0.5 75", 0), 75),
        (("kill", 0, 0), 75),
        (("sleep:0.8 4", 3, "sleep:0.8 5"), 3),
        ((141, 0, 0), 141),
    ],
    ids=str,
)
def test_what_the_processes_end_with_together(ends, code, local, fake_python):
    fake_python.plan(*([end] for end in ends))
    done = local("-n", "3", "--restarts=0")
    assert done.returncode == code
    if code:
        assert done.stderr.endswith(f"local.sh: ended with {code}\n")
    else:
        assert done.stderr == ""


def test_run_again_after_75_until_it_is_done(local, fake_python):
    fake_python.plan([75, 75, 0], ["kill", 0, 0])
    done = local("-n", "2", "--backoff=0")
    assert done.returncode == 0
    assert [len(fake_python.calls(i)) for i in range(2)] == [3, 3]
    assert "restart 2 of 10 without a new checkpoint" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 141])
def test_not_run_again_after_anything_else(code, local, fake_python):
    fake_python.plan([code, 0])
    assert local().returncode == code
    assert len(fake_python.calls()) == 1


def test_restarts_are_limited(local, fake_python):
    fake_python.plan([75])
    done = local("--backoff=0", "--restarts=3")
    assert done.returncode == 75
    assert len(fake_python.calls()) == 4
    assert "given up: 3 restarts without a new checkpoint" in done.stderr


@pytest.mark.parametrize("flag", ["--workdir={}", "-workdir={}"])
def test_a_new_checkpoint_forgives_the_restarts_before(flag, local, fake_python, tmp_path):
    # The first life finds step 4 from before; a broken one is none.
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "broken-90").mkdir()
    fake_python.plan(["75", "75", "save:8 75", "75", "save:12 75", "75", "75", "75"])
    done = local(
        "--backoff=0",
        "--restarts=2",
        arguments=[CONFIG, "--workdir=" + str(tmp_path / "run")],
    )
    assert done.returncode == 75
    assert len(fake_python.calls()) == 7


def test_the_backoff_doubles_up_to_five_minutes(local, fake_python, recorded):
    recorded.program("sleep", "if sys.argv[1] == '0.2': import time; time.sleep(0.2)")
    fake_python.plan([75])
    assert local("--restarts=8", env={"PATH": recorded.path}).returncode == 75
    slept = [int(call[0]) for call in recorded.calls("sleep") if call != ["0.2"]]
    assert slept == [5, 10, 20, 40, 80, 160, 300, 300]


@pytest.mark.parametrize("other", ["until_signal 75", "for_ever"])
def test_the_others_are_ended_when_one_ended_badly(other, local, fake_python):
    fake_python.plan(["1"], [other], [other])
    done = local("-n", "3", "--grace=1")
    # Not 75, although the others were killed: what the first ended with is why.
    assert done.returncode == 1
    assert "2 of 3 processes go on after one ended with 1: SIGTERM" in done.stderr
    assert ("SIGKILL" in done.stderr) == (other == "for_ever")
    for process in (1, 2):
        (call,) = fake_python.calls(process)
        assert call["signals"] == ["SIGTERM"]
        assert not alive(call["pid"])


def test_the_others_are_left_alone_after_a_good_end(local, fake_python):
    fake_python.plan(["0"], ["sleep:2 0"])
    assert local("-n", "2", "--grace=0").returncode == 0
    assert fake_python.calls(1)[0]["signals"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_ends_the_script(number, started, fake_python):
    fake_python.plan(["until_signal sleep:0.5 75"], ["until_signal sleep:0.5 75"])
    script = started(2)
    os.kill(script.pid, number)
    assert script.wait(20) == 75
    for process in range(2):
        (call,) = fake_python.calls(process)
        assert call["signals"] == [number.name]
    assert "again" not in script.stderr.read()


def test_ctrl_c_reaches_every_process_once(started, fake_python):
    """A terminal signals the whole process group of the script."""
    fake_python.plan(["until_signal sleep:0.5 75"], ["until_signal sleep:0.5 75"])
    script = started(2)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(20) == 75
    assert [fake_python.calls(i)[0]["signals"] for i in range(2)] == [["SIGINT"], ["SIGINT"]]


def test_a_second_signal_is_passed_on_too(started, fake_python, eventually):
    fake_python.plan(["until_two_signals 75"])
    script = started(1)
    script.send_signal(signal.SIGTERM)
    eventually(lambda: fake_python.calls()[0]["signals"])
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 75


def test_a_run_that_ends_well_although_a_signal_came(started, fake_python):
    fake_python.plan(["until_signal 0"])
    script = started(1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 0


def test_a_signal_between_two_lives_ends_the_script(started, fake_python, eventually):
    fake_python.plan(["75"])
    script = started(1, "--backoff=30")
    eventually(lambda: "again in 30 s" in script.stderr.readline())
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 75
    assert script.stderr.read() == "", "nothing was started any more"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["-n", "0", "--", CONFIG], "-n takes a whole number of at least 1, not '0'"),
        (["-n", "2x", "--", CONFIG], "-n takes a whole number of at least 1, not '2x'"),
        (["-n", "08", "--", CONFIG], "-n takes a whole number of at least 1, not '08'"),
        (["-n"], "-n: its value is missing"),
        (["-d", "none", "--", CONFIG], "-d takes a whole number"),
        (["--restarts=-1", "--", CONFIG], "--restarts takes a whole number"),
        (["--restart=1", "--", CONFIG], "'--restart=1' is unknown here"),
        ([CONFIG], f"'{CONFIG}' is unknown here; what is meant for jaxllm.main stands after --"),
        (["-n", "2"], "nothing stands after --"),
        (["--"], "nothing stands after --"),
    ],
    ids=str,
)
def test_a_wrong_command_line(command, message, run_script, fake_python):
    done = run_script("local.sh", *command, env={"PYTHON": str(fake_python.path)})
    assert done.returncode == 2
    assert message in done.stderr
    assert fake_python.calls() == []


def test_dry_run_prints_the_commands_and_runs_nothing(local, fake_python, environment):
    fake_python.plan([0], [0])
    arguments = [CONFIG, "--config.prompt=two words, $HOME"]
    done = local("-n", "2", "-d", "2", "--dry-run", arguments=arguments)
    assert done.returncode == 0
    assert fake_python.calls() == fake_python.calls(1) == []
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for process, line in enumerate(lines):
        words = shlex.split(line)
        assert words[-3:] == [
            "--coordinator=127.0.0.1:PORT", "--processes=2", f"--process={process}",
        ]  # fmt: skip
        # It is the command itself.
        assert subprocess.run(["bash", "-c", line], env=environment, timeout=20).returncode == 0
        assert fake_python.calls(process)[0]["argv"][2:4] == arguments


def test_help_is_the_head_of_the_script(run_script):
    done = run_script("local.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Runs `python -m jaxllm.main ARGUMENTS`")
    assert "set -euo" not in done.stdout
