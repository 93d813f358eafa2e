"""launch/tpu_vm.sh: the exact command lines of gcloud, noted by a program that stands for it."""

import subprocess
import tarfile
import time
from pathlib import Path

import pytest

TPU = {
    "TPU_NAME": "pod",
    "TPU_ZONE": "us-east5-b",
    "TPU_TYPE": "v6e-16",
    "TPU_VERSION": "v2-alpha-tpuv6e",
}
RUN = ("run", "--", "--config=configs/pretrain.py:1b", "--workdir=/mnt/runs/a b")
ACTIONS = ("create", "queue", "install", RUN, "logs", "stop", "status", "delete")


@pytest.fixture
def tpu_vm(run_script, recorded):
    recorded.program("gcloud")

    def run(*arguments, **env):
        env = TPU | {"PATH": recorded.path} | env
        return run_script("tpu_vm.sh", *arguments, env=env)

    return run


def test_create(tpu_vm, recorded):
    assert tpu_vm("create").returncode == 0
    assert recorded.calls("gcloud") == [
        "compute tpus tpu-vm create pod --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e "
        "--zone=us-east5-b".split()
    ]


def test_create_with_everything(tpu_vm, recorded):
    done = tpu_vm(
        "create", TPU_SPOT="1", TPU_PROJECT="mine", TPU_CREATE_OPTIONS="--network=a --tags=b,c"
    )
    assert done.returncode == 0
    assert recorded.calls("gcloud") == [
        "compute tpus tpu-vm create pod --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e --spot "
        "--network=a --tags=b,c --zone=us-east5-b --project=mine".split()
    ]


def test_queue(tpu_vm, recorded):
    assert tpu_vm("queue", TPU_SPOT="1", TPU_VALID_UNTIL="6h").returncode == 0
    assert recorded.calls("gcloud") == [
        "compute tpus queued-resources create pod --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=pod --spot --valid-until-duration=6h "
        "--zone=us-east5-b".split()
    ]


def test_queue_several_slices(tpu_vm, recorded):
    assert tpu_vm("queue", TPU_SLICES="2").returncode == 0
    assert recorded.calls("gcloud") == [
        "compute tpus queued-resources create pod --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=pod "
        "--zone=us-east5-b".split()
    ]


def test_install_copies_the_last_commit_to_all_workers_then_installs(tpu_vm, recorded, tmp_path):
    # What is copied is gone afterwards; keep what the first call copies.
    kept = str(tmp_path / "a.tgz")
    recorded.program(
        "gcloud", f"import shutil\nif 'scp' in sys.argv: shutil.copy(sys.argv[5], {kept!r})"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = tpu_vm("install", TPU_SSH_OPTIONS="--internal-ip", TMPDIR=str(temporary))
    assert done.returncode == 0
    copy, install = recorded.calls("gcloud")
    assert copy[:4] == "compute tpus tpu-vm scp".split()
    assert copy[5:] == "pod:jaxllm.tar.gz --worker=all --internal-ip --zone=us-east5-b".split()
    assert install[:7] == "compute tpus tpu-vm ssh pod --worker=all --internal-ip".split()
    assert install[8:] == ["--zone=us-east5-b"]
    script = install[7].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", script], timeout=20).returncode == 0
    assert "--constraint requirements.lock --editable '.[tpu]'" in script
    with tarfile.open(tmp_path / "a.tgz") as archive:
        assert {"setup.cfg", "requirements.lock", "jaxllm/main.py"} <= set(archive.getnames())
    assert list(temporary.iterdir()) == []


def test_install_stops_where_copying_fails(tpu_vm, recorded):
    recorded.program("gcloud", "sys.exit('no room' if 'scp' in sys.argv else 0)")
    done = tpu_vm("install", TPU_SLICES="2")
    assert done.returncode == 1
    assert "no room" in done.stderr
    assert len(recorded.calls("gcloud")) == 1


def test_run_starts_the_command_on_all_workers_of_all_slices(tpu_vm, recorded):
    assert tpu_vm(*RUN, TPU_SLICES="2").returncode == 0
    calls = recorded.calls("gcloud")
    assert [call[4] for call in calls] == ["pod-0", "pod-1"]
    for call in calls:
        assert call[:4] + call[5:6] + call[7:] == [
            *"compute tpus tpu-vm ssh --worker=all --zone=us-east5-b".split()
        ]
        assert call[6].startswith("--command=")
    assert calls[0][6] == calls[1][6]


@pytest.fixture
def worker(tmp_path, recorded, fake_python, environment):
    """A worker's home with an installation, and what runs a command there as ssh does."""
    folder = tmp_path / "home" / "jaxllm"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(fake_python.path)
    (folder / "launch").symlink_to(Path(__file__).parents[2] / "launch")

    def run(call):
        command = next(a for a in call if a.startswith("--command=")).removeprefix("--command=")
        return subprocess.run(
            ["bash", "-c", command],
            env=environment | {"PYTHON": str(folder / ".venv" / "bin" / "python")},
            cwd=folder.parent,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_the_command_on_a_worker(tpu_vm, recorded, worker, fake_python, eventually, tmp_path):
    """What `run`, `status` and `stop` send does what it should, in a home of a worker."""
    fake_python.plan(["until_signal 75"])
    tpu_vm(*RUN)
    tpu_vm("stop")
    tpu_vm("status")
    start, stop, *_, status = recorded.calls("gcloud")

    assert "not running" in worker(status).stdout
    begin = time.monotonic()
    assert worker(start).returncode == 0
    assert time.monotonic() - begin < 5, "it must not wait for the run"
    (call,) = eventually(fake_python.calls)
    assert call["argv"] == ["-m", "jaxllm.main", "--processes=auto", *RUN[2:]]
    assert worker(status).stdout.splitlines()[0] == "running"
    again = worker(start)
    assert again.returncode == 2
    assert "a run goes on here already" in again.stderr
    assert len(fake_python.calls()) == 1

    assert worker(stop).returncode == 0
    eventually(lambda: "not running" in worker(status).stdout)
    assert fake_python.calls()[0]["signals"] == ["SIGTERM"]
    assert worker(status).stdout.splitlines() == ["not running", "local.sh: ended with 75"]
    # Ended is ended: it can be started again, and goes on in the same log.
    fake_python.plan([0])
    assert worker(start).returncode == 0
    eventually(lambda: len(fake_python.calls()) == 2)
    eventually(lambda: "not running" in worker(status).stdout)
    assert "ended with 75" in (tmp_path / "home" / "jaxllm" / "run.log").read_text()


def test_logs_follow_one_worker(tpu_vm, recorded):
    assert tpu_vm("logs", TPU_WORKER="3", TPU_SLICES="2").returncode == 0
    (call,) = recorded.calls("gcloud")
    assert call == [
        *"compute tpus tpu-vm ssh pod-0 --worker=3".split(),
        "--command=tail -n 100 -F jaxllm/run.log",
        "--zone=us-east5-b",
    ]


def test_status_of_queue_tpus_and_run(tpu_vm, recorded):
    assert tpu_vm("status").returncode == 0
    queue, tpus, run = recorded.calls("gcloud")
    # The whole name, after the path that gcloud puts before it.
    assert queue == [
        *"compute tpus queued-resources list".split(), '--filter=name~"/pod$"',
        "--format=value(name.basename(),state.state)", "--zone=us-east5-b",
    ]  # fmt: skip
    assert tpus == [
        *"compute tpus tpu-vm list".split(), '--filter=name~"/pod(-[0-9]+)?$"',
        "--format=value(name.basename(),state,health,acceleratorType)", "--zone=us-east5-b",
    ]  # fmt: skip
    assert run[:6] == "compute tpus tpu-vm ssh pod --worker=all".split()


@pytest.mark.parametrize("queued", [True, False])
def test_delete_takes_the_place_in_the_queue_too(queued, tpu_vm, recorded):
    recorded.program("gcloud", f"sys.exit(0 if {queued} or 'describe' not in sys.argv else 1)")
    assert tpu_vm("delete").returncode == 0
    what = "queued-resources delete pod --force" if queued else "tpu-vm delete pod"
    assert recorded.calls("gcloud") == [
        "compute tpus queued-resources describe pod --zone=us-east5-b".split(),
        f"compute tpus {what} --quiet --zone=us-east5-b".split(),
    ]


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_a_failing_gcloud_fails_the_script(action, tpu_vm, recorded):
    recorded.program("gcloud", "print('denied', file=sys.stderr); sys.exit(5)")
    done = tpu_vm(*([action] if isinstance(action, str) else action))
    assert done.returncode == 5
    assert "denied" in done.stderr
    assert len(recorded.calls("gcloud")) == (2 if action == "delete" else 1)


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_dry_run_prints_the_command_lines_and_calls_nothing(action, tpu_vm, recorded, environment):
    action = (action,) if isinstance(action, str) else action
    dry = tpu_vm(action[0], "--dry-run", *action[1:])
    assert (dry.returncode, recorded.calls("gcloud")) == (0, [])
    # What is printed can be run, and is what is called without the flag.
    env = environment | {"PATH": recorded.path}
    assert subprocess.run(["bash", "-c", dry.stdout], env=env, timeout=20).returncode == 0
    printed = recorded.calls("gcloud")
    recorded.program("gcloud", "sys.exit('describe' in sys.argv)")
    tpu_vm(*action)
    called = recorded.calls("gcloud")[len(printed) :]
    printed = [call for call in printed if "--force" not in call]  # of `delete`, the other case
    if action[0] == "install":  # the temporary file has another name
        for lines in (called, printed):
            lines[0][4] = Path(lines[0][4]).name
    assert printed == called
    assert called


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["make"], {}, "'make' is unknown; it is one of create queue"),
        (["create"], {"TPU_NAME": ""}, "set TPU_NAME in the environment"),
        (["create"], {"TPU_ZONE": ""}, "set TPU_ZONE"),
        (["create"], {"TPU_TYPE": ""}, "set TPU_TYPE"),
        (["queue"], {"TPU_VERSION": ""}, "set TPU_VERSION"),
        (["create"], {"TPU_SLICES": "2"}, "several slices can only be queued"),
        (["queue"], {"TPU_SLICES": "0"}, "TPU_SLICES must be 1 or more"),
        (["create"], {"TPU_SPOT": "yes"}, "TPU_SPOT must be 0 or 1, not 'yes'"),
        (["run"], {}, "give a command, as in: run -- --config=..."),
        (["run", "--config=x"], {}, "'--config=x' is unknown here"),
        (["stop", "now"], {}, "'now' is unknown here"),
        (["install"], {"TPU_FOLDER": "a b; rm"}, "TPU_FOLDER must be a plain name"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_before_anything_is_done(arguments, env, message, tpu_vm, recorded):
    done = tpu_vm(*arguments, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert recorded.calls("gcloud") == []
