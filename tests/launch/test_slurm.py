"""launch/slurm.sbatch: what it asks SLURM for; and with a real SLURM, coming back after 75."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SCRIPT = CHECKOUT / "launch" / "slurm.sbatch"
ARGUMENTS = ["--config=configs/pretrain.py", "--workdir=run", "--config.prompt=two words, $HOME"]


@pytest.fixture
def in_job(recorded, fake_python, tmp_path):
    """The environment of a job with one task: `srun` runs its command, `scontrol` does nothing."""
    recorded.program(
        "srun",
        "command = [a for a in sys.argv[1:] if not a.startswith('-')]\n"
        "os.execv(command[0], sys.argv[sys.argv.index(command[0]):])",
    )
    recorded.program("scontrol")
    return {
        "PATH": recorded.path,
        "PYTHON": str(fake_python.path),
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


@pytest.fixture
def job(run_script, in_job, tmp_path):
    def run(restarts=0, **env):
        env = in_job | {"SLURM_RESTART_COUNT": str(restarts)} | env
        return run_script("slurm.sbatch", *ARGUMENTS, env=env, cwd=tmp_path)

    return run


def test_a_step_of_all_tasks_runs_the_command(job, recorded, fake_python):
    fake_python.plan([0])
    assert job(SRUN_OPTIONS="--mpi=none --cpu-bind=cores").returncode == 0
    assert recorded.calls("srun") == [
        ["--kill-on-bad-exit=0", "--wait=90", "--mpi=none", "--cpu-bind=cores",
         str(fake_python.path), "-m", "jaxllm.main", *ARGUMENTS]
    ]  # fmt: skip
    assert fake_python.calls()[0]["argv"][2:] == ARGUMENTS
    assert recorded.calls("scontrol") == []


@pytest.mark.parametrize("end", ["75", "kill"])
def test_requeued_after_75_or_a_killed_task(end, job, recorded, fake_python):
    fake_python.plan([end])
    assert job().returncode == 75
    assert recorded.calls("scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize("end", [1, 2, 141])
def test_not_requeued_after_anything_else(end, job, recorded, fake_python):
    fake_python.plan([end])
    assert job().returncode == end
    assert recorded.calls("scontrol") == []


def test_requeues_are_limited_and_further_and_further_apart(job, recorded, fake_python):
    fake_python.plan([75])
    for restarts in range(7):
        done = job(restarts, RESTARTS="6")
        assert done.returncode == 75
    assert "given up: 6 restarts without a new checkpoint" in done.stderr
    calls = recorded.calls("scontrol")
    assert calls.count(["requeue", "7"]) == 6
    assert [call[-1] for call in calls if call[0] == "update"] == [
        f"StartTime=now+{delay}" for delay in (150, 300, 600, 1200, 1800)
    ]


def test_a_new_checkpoint_forgives_the_restarts_before(job, recorded, fake_python, tmp_path):
    fake_python.plan(["75", "75", "save:8 75", "75", "75", "75"])
    for restarts in range(6):
        done = job(restarts, RESTARTS="2")
        requeued = ["requeue", "7"] in recorded.calls("scontrol")[-2:]
        assert ("given up" in done.stderr) == (restarts == 4), restarts
        if restarts == 4:
            break
        assert requeued


def test_a_signal_to_the_job_waits_for_the_tasks_and_is_no_reason_to_come_back(
    start_script, in_job, recorded, fake_python, tmp_path, eventually
):
    """`scancel` signals the tasks and the script."""
    fake_python.plan(["until_signal sleep:0.5 75"])
    script = start_script("slurm.sbatch", *ARGUMENTS, env=in_job, cwd=tmp_path)
    (task,) = eventually(fake_python.calls)
    script.send_signal(signal.SIGTERM)
    os.kill(task["pid"], signal.SIGTERM)
    assert script.wait(20) == 75
    assert recorded.calls("scontrol") == []


def test_a_site_that_does_not_requeue(job, recorded, fake_python):
    recorded.program("scontrol", "sys.exit('Requested operation is presently disabled')")
    fake_python.plan([75])
    done = job()
    assert done.returncode == 75
    assert "cannot requeue: submit the same command again" in done.stderr


def test_no_arguments(run_script, in_job, recorded):
    done = run_script("slurm.sbatch", env=in_job)
    assert done.returncode == 2
    assert "give the arguments of jaxllm.main" in done.stderr
    assert recorded.calls("srun") == []


def test_dry_run_prints_options_and_command(run_script, in_job, recorded):
    done = run_script("slurm.sbatch", "--dry-run", *ARGUMENTS, env=in_job | {"RESTARTS": "4"})
    assert (done.returncode, done.stderr, recorded.calls("srun")) == (0, "", [])
    options = re.findall(r"^#SBATCH (.*)", SCRIPT.read_text(), re.MULTILINE)
    assert [f"sbatch: {option}" for option in options] == done.stdout.splitlines()[: len(options)]
    assert "-m jaxllm.main --config=configs/pretrain.py" in done.stdout
    assert "at most 4 times in a row" in done.stdout


with_slurm = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
    reason="needs Debian's slurm-wlm and munge, and root",
)


def _submit(environment, tmp_path, after, *arguments, seconds=240, **env):
    """Submits two tasks to a cluster of its own; then runs `after`, and waits for the job's end.

    Returns:
        The log of the job, and what the test's own commands printed.
    """
    (tmp_path / "work").mkdir(exist_ok=True)
    commands = f"""
cd {tmp_path}/work
job=$(sbatch --parsable --ntasks-per-node=2 --signal=TERM@60 --output=log.txt {SCRIPT} "$@")
{after}
for ((i = 0; i < {5 * seconds}; i++)); do
    [[ $(squeue --noheader) ]] || break
    sleep 0.2
done
scontrol show job "$job"
"""
    command = ["bash", str(HERE / "with_slurm.sh"), str(tmp_path / "cluster")]
    process = subprocess.Popen(
        [*command, "bash", "-c", commands, "-", *arguments],
        env=environment | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shown, errors = process.communicate(timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends the cluster
        process.communicate(timeout=120)
        raise
    assert process.returncode == 0, errors
    return (tmp_path / "work" / "log.txt").read_text(), shown


@with_slurm
@pytest.mark.slow
def test_a_real_slurm_requeues_the_job_until_it_is_done(environment, tmp_path, fake_python):
    fake_python.plan(["75", "save:4 75", "0"], ["75", "sleep:1 75", "0"])
    env = {"PYTHON": str(fake_python.path), "BACKOFF": "8", "CHECKOUT": str(CHECKOUT)}
    log, shown = _submit(environment, tmp_path, "", *ARGUMENTS, **env)
    assert "JobState=COMPLETED" in shown
    assert "Restarts=2" in shown
    assert "ExitCode=0:0" in shown
    for process in range(2):
        lives = fake_python.calls(process)
        assert len(lives) == 3
        for life in lives:
            assert life["argv"] == ["-m", "jaxllm.main", *ARGUMENTS]
            assert life["env"]["SLURM_NTASKS"] == "2"
            assert life["signals"] == []
    # All lives write to one log.
    assert log.count("requeued (restart 1 of 10") == 2
    assert log.splitlines()[-1] == "slurm.sbatch: ended with 0"


@with_slurm
@pytest.mark.slow
def test_a_real_slurm_signals_the_tasks_alone_and_ends_a_cancelled_job(
    environment, tmp_path, fake_python
):
    """`scancel --signal` reaches each task once, and the job comes back; `scancel` is the end."""
    fake_python.plan(*[["until_signal sleep:1 75", "until_signal 75", "0"]] * 2)
    calls = f"{fake_python.folder}/called"
    after = f"""
until [[ -e {calls}-0-0.json && -e {calls}-1-0.json ]]; do sleep 0.2; done
scancel --signal=TERM "$job"
until [[ -e {calls}-0-1.json && -e {calls}-1-1.json ]]; do sleep 0.2; done
scancel "$job"
"""
    env = {"PYTHON": str(fake_python.path), "CHECKOUT": str(CHECKOUT)}
    log, shown = _submit(environment, tmp_path, after, *ARGUMENTS, **env)
    assert "JobState=CANCELLED" in shown
    assert "Restarts=1" in shown
    for process in range(2):
        lives = fake_python.calls(process)
        assert [life["signals"] for life in lives] == [["SIGTERM"], ["SIGTERM"]]
    assert log.count("requeued") == 1


@with_slurm
@pytest.mark.slow
def test_a_real_slurm_runs_pretraining_to_the_end_through_a_requeue(environment, tmp_path):
    steps = 300
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(40)]
    documents = [" ".join(draw.choices(words, k=50)) for _ in range(60)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    run = tmp_path / "run"
    fields = {
        "data.train": text, "data.seq_len": 32, "data.eval_fraction": 0.2,
        "tokenizer.vocab_size": 300, "model.layers": 1, "model.width": 16, "model.heads": 2,
        "batch_size": 8, "steps": steps, "log.every": 1, "checkpoint.every": 100,
        "eval.every": steps, "max_new_tokens": 4, "references": False,
    }  # fmt: skip
    arguments = [
        f"--config={CHECKOUT}/configs/pretrain.py",
        f"--workdir={run}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    # As the preemption of a job does, in the middle of training.
    after = f"""
until grep -q '"step": 30,' {run}/metrics.jsonl; do
    [[ $(squeue --noheader) ]] || exit
    sleep 0.1
done
scancel --signal=TERM "$job"
"""
    env = {
        "PYTHON": sys.executable,
        "CHECKOUT": str(CHECKOUT),
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    log, shown = _submit(environment, tmp_path, after, *arguments, **env)
    assert "JobState=COMPLETED" in shown, log
    assert "Restarts=1" in shown
    # One run of two processes, which wrote once: not two runs.
    saved = re.findall(r"a signal to one of its processes after step (\d+), which is saved", log)
    assert len(saved) == 1
    assert 30 <= int(saved[0]) < steps
    assert log.count("requeued (restart 1 of 10") == 1
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, steps + 1))
    assert (run / "summary.json").exists()
