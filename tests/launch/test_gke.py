"""launch/gke: the manifests as they are filled in, and the script that containers run."""

import os
import signal
import time

import pytest
import yaml

COMMON = {
    "JOB_NAME": "first-run",
    "IMAGE": "eu-docker.pkg.dev/p/r/jaxllm:1",
    "VOLUME_CLAIM": "runs",
}
ENV = {
    "tpu": COMMON | {"HOSTS": "4", "TPU_ACCELERATOR": "tpu-v6e-slice", "TPU_TOPOLOGY": "4x4"},
    "gpu": COMMON | {"HOSTS": "2", "GPU_ACCELERATOR": "nvidia-h100-80gb"},
}
ARGUMENTS = [
    "--config=configs/pretrain.py:1b",
    "--workdir=/runs/first",
    "--config.prompt=a \"quoted\" \\ $(HOSTNAME) ${HOME} $HOME: {x} 'y' # 数",
]
KINDS = sorted(ENV)


@pytest.fixture
def launch(run_script, recorded):
    recorded.program(
        "kubectl", f"Path({str(recorded.folder / 'given.yaml')!r}).write_text(sys.stdin.read())"
    )

    def run(kind, *options, arguments=ARGUMENTS, **env):
        env = ENV[kind] | {"PATH": recorded.path} | env
        return run_script("gke/launch.sh", kind, *options, "--", *arguments, env=env)

    return run


@pytest.fixture
def rendered(launch):
    def render(kind, **env):
        done = launch(kind, "--dry-run", **env)
        assert (done.returncode, done.stderr) == (0, "")
        return yaml.safe_load(done.stdout)

    return render


def container(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def expanded(arguments, env):
    """What Kubernetes makes of arguments: $(NAME) is a variable, $$( is $(."""
    marked = [argument.replace("$$(", "\0") for argument in arguments]
    for name, value in env.items():
        marked = [argument.replace(f"$({name})", value) for argument in marked]
    return [argument.replace("\0", "$(") for argument in marked]


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_arrive_as_they_were_given(kind, rendered):
    assert expanded(container(rendered(kind))["args"], {"HOSTNAME": "wrong"}) == ARGUMENTS


def _read_as_jobset(manifest):
    """What the types made from JobSet's schema hold of a manifest: all, unless a name is wrong."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_is_valid_for_jobset(kind, rendered):
    manifest = rendered(kind)
    assert _read_as_jobset(manifest) == manifest


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (("spec",), "replicatedJob", []),
        (("spec", "failurePolicy"), "maxRestart", 3),
        (("spec", "failurePolicy", "rules", 0), "onJobFailureReason", ["PodFailurePolicy"]),
        (("spec", "replicatedJobs", 0), "replica", 1),
    ],
)
def test_a_name_that_jobset_does_not_know_is_found(rendered, place, name, value):
    manifest = rendered("tpu")
    inner = manifest
    for key in place:
        inner = inner[key]
    inner[name] = value
    assert _read_as_jobset(manifest) != manifest


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_of_a_jobset(kind, rendered):
    """What the schema of jobset.x-k8s.io/v1alpha2 says of values in words."""
    manifest = rendered(kind, MAX_RESTARTS="7")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "first-run"
    spec = manifest["spec"]
    assert set(spec) <= {"failurePolicy", "replicatedJobs", "network"}
    assert set(spec.get("network", {})) <= {"subdomain"}
    policy = spec["failurePolicy"]
    assert set(policy) == {"maxRestarts", "restartStrategy", "rules"}
    assert policy["maxRestarts"] == 7
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")
    for rule in policy["rules"]:
        assert set(rule) == {"name", "action", "onJobFailureReasons"}
        assert rule["name"].isalpha()
        assert rule["action"] in ("FailJobSet", "RestartJobSet")
    (job,) = spec["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    assert set(job["template"]) == {"spec"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_jobs_are_valid_for_kubernetes(kind, rendered):
    validate = pytest.importorskip("kubernetes_validate")
    (job,) = rendered(kind)["spec"]["replicatedJobs"]
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    version = validate.latest_version()
    validate.validate(made, version, strict=True)
    job["template"]["spec"]["paralelism"] = 1
    with pytest.raises(Exception, match="paralelism"):
        validate.validate(made, version, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_run_again_is_and_what_is_not_is_not(kind, rendered):
    spec = rendered(kind)["spec"]
    (job,) = spec["replicatedJobs"]
    job = job["template"]["spec"]
    # One failed pod fails the Job, with which the JobSet starts all pods anew.
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    assert codes["operator"] == "In"
    assert {1, 2} <= set(codes["values"])
    assert not {0, 75, 137, 143} & set(codes["values"])
    # Kubernetes takes such rules only where pods are not restarted in their place.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert codes["containerName"] == container({"spec": spec})["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_tpu(rendered):
    manifest = rendered("tpu", SLICES="3", TPU_CHIPS="8", GRACE_PERIOD="60")
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 3
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (4, 4)
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 60
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container(manifest)["resources"]["limits"] == {"google.com/tpu": 8}
    assert container(manifest)["command"] == ["/app/launch/gke/start.sh"]


def test_gpu(rendered):
    manifest = rendered("gpu", GPUS="4")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    assert container(manifest)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    # The first pod, by the name that JobSet gives it in the headless service.
    host = f"first-run-{job['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    command = expanded(container(manifest)["command"], {"JOB_COMPLETION_INDEX": "1"})
    assert command == [
        "/app/launch/gke/start.sh", f"--coordinator={host}:8476", "--processes=2", "--process=1",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("spot", "operator"), [("0", "DoesNotExist"), ("1", "Exists")])
def test_spot(kind, spot, operator, rendered):
    (job,) = rendered(kind, SPOT=spot)["spec"]["replicatedJobs"]
    affinity = job["template"]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "cloud.google.com/gke-spot", "operator": operator}]


def test_the_manifest_goes_to_kubectl(launch, recorded):
    printed = launch("gpu", "--dry-run")
    assert recorded.calls("kubectl") == []
    assert launch("gpu", KUBECTL_OPTIONS="--namespace=ml --context=c").returncode == 0
    assert recorded.calls("kubectl") == [
        ["create", "--namespace=ml", "--context=c", "--filename=-"]
    ]
    assert (recorded.folder / "given.yaml").read_text() == printed.stdout


def test_a_failing_kubectl_fails_the_script(launch, recorded):
    recorded.program("kubectl", "sys.exit('AlreadyExists')")
    done = launch("tpu")
    assert done.returncode == 1
    assert "AlreadyExists" in done.stderr


@pytest.mark.parametrize(
    ("kind", "env", "message"),
    [
        ("tpu", {"JOB_NAME": ""}, "set JOB_NAME in the environment"),
        ("tpu", {"IMAGE": ""}, "set IMAGE"),
        ("gpu", {"VOLUME_CLAIM": ""}, "set VOLUME_CLAIM"),
        ("gpu", {"HOSTS": ""}, "set HOSTS"),
        ("tpu", {"TPU_ACCELERATOR": ""}, "set TPU_ACCELERATOR"),
        ("tpu", {"TPU_TOPOLOGY": ""}, "set TPU_TOPOLOGY"),
        ("gpu", {"GPU_ACCELERATOR": ""}, "set GPU_ACCELERATOR"),
        ("tpu", {"JOB_NAME": "First_Run"}, "JOB_NAME='First_Run' does not look like one"),
        ("tpu", {"JOB_NAME": "a" * 41}, "does not look like one"),
        ("tpu", {"TPU_TOPOLOGY": "16"}, "TPU_TOPOLOGY='16' does not look like one"),
        ("gpu", {"HOSTS": "two"}, "HOSTS='two' does not look like one"),
        ("gpu", {"IMAGE": 'x"\n  evil: 1'}, "does not look like one"),
        ("gpu", {"SPOT": "yes"}, "SPOT must be 0 or 1, not 'yes'"),
    ],
    ids=str,
)
def test_a_missing_or_wrong_variable_is_told(kind, env, message, launch, recorded):
    done = launch(kind, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert recorded.calls("kubectl") == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cpu", "--", "x"], "'cpu' is neither tpu nor gpu"),
        (["tpu", "--config=x"], "what is meant for jaxllm.main stands after --"),
        (["tpu", "--"], "nothing stands after --"),
        (["tpu", "--", "two\nlines"], "has a control character"),
    ],
    ids=str,
)
def test_a_wrong_command_line(command, message, run_script):
    done = run_script("gke/launch.sh", *command, env=ENV["tpu"])
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def in_container(fake_python, recorded):
    """The environment of a container: `python` is the fake one, and `sleep` takes no time."""
    (recorded.folder / "python").symlink_to(fake_python.path)
    recorded.program("sleep")
    return {"PATH": recorded.path}


@pytest.mark.parametrize(("restarts", "slept"), [(0, []), (1, ["5"]), (3, ["20"]), (9, ["300"])])
def test_a_restarted_container_waits_first(
    restarts, slept, in_container, run_script, fake_python, recorded
):
    fake_python.plan([75])
    done = run_script("gke/start.sh", *ARGUMENTS, env=in_container | {"RESTARTS": str(restarts)})
    assert done.returncode == 75
    assert [call[0] for call in recorded.calls("sleep")] == slept
    (call,) = fake_python.calls()
    assert call["argv"] == ["-m", "jaxllm.main", *ARGUMENTS]


def test_a_container_that_waits_ends_at_once_on_a_signal(
    in_container, start_script, fake_python, recorded, eventually
):
    recorded.program("sleep", "import time; time.sleep(20)")
    script = start_script("gke/start.sh", *ARGUMENTS, env=in_container | {"RESTARTS": "1"})
    eventually(lambda: recorded.calls("sleep"))
    begin = time.monotonic()
    script.send_signal(signal.SIGTERM)
    assert script.wait(15) == 75
    assert time.monotonic() - begin < 10
    assert fake_python.calls() == []


def test_the_program_takes_the_place_of_the_script(
    in_container, start_script, fake_python, eventually
):
    """So that the signals of Kubernetes, which go to the first process, reach it."""
    fake_python.plan(["until_signal 75"])
    script = start_script("gke/start.sh", *ARGUMENTS, env=in_container)
    (call,) = eventually(fake_python.calls)
    assert call["pid"] == script.pid
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait(15) == 75
