"""The pages of docs/ on launching: every variable and option is explained, every command runs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    "launch_local.md": "local.sh",
    "launch_slurm.md": "slurm.sbatch",
    "launch_tpu_vm.md": "tpu_vm.sh",
    "launch_gke.md": "gke/launch.sh",
    "launch_docker.md": "Dockerfile",
}
WITH_VARIABLES = [page for page in PAGES if page != "launch_docker.md"]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def table_rows(page):
    """The names in the first cell of every row of a table, each with the rest of its row."""
    for line in read(f"docs/{page}").splitlines():
        if line.startswith("| `"):
            first, _, rest = line[1:].partition("|")
            for name in re.findall(r"`([^`]+)`", first):
                yield name, rest


@pytest.mark.parametrize("page", PAGES)
def test_the_opening_page_leads_to_each(page):
    assert f"]({page})" in read("docs/launching.md")
    assert f"`launch/{PAGES[page]}`" in read("docs/launching.md")


@pytest.mark.parametrize("page", WITH_VARIABLES)
def test_every_variable_is_explained_with_its_default(page):
    rows = dict(table_rows(page))
    found = re.findall(r"^(\w+)=\$\{\1:-(.*?)\}", read(f"launch/{PAGES[page]}"), re.MULTILINE)
    assert found or page == "launch_local.md"
    for name, default in found:
        # The tables abbreviate: `-topology` after a whole label is no variable.
        assert name in rows, f"{page} does not explain {name}"
        if default.isdigit() or name == "TPU_FOLDER":
            assert default in rows[name].split("|")[0], f"{page}: the default of {name}"


@pytest.mark.parametrize("page", WITH_VARIABLES)
def test_no_variable_is_explained_that_is_not_there(page):
    script = read(f"launch/{PAGES[page]}")
    for name, _ in table_rows(page):
        if name.isupper() and "-" not in name:
            assert re.search(rf"\b{name}\b", script), f"{page} explains {name}"


def test_every_option_of_the_local_script_is_explained():
    rows = {name.split("=")[0].split()[0] for name, _ in table_rows("launch_local.md")}
    options = set(re.findall(r"^    (--?[a-z][a-z-]*)(?==\*\)|\))", read("launch/local.sh"), re.M))
    assert {"-n", "-d", "--grace", "--dry-run"} <= options
    assert options <= rows


def test_every_option_of_sbatch_in_the_script_is_explained():
    rows = dict(table_rows("launch_slurm.md"))
    for option in re.findall(r"^#SBATCH (.*)", read("launch/slurm.sbatch"), re.MULTILINE):
        name, _, value = option.partition("=")
        assert value in rows[name]


def test_every_build_argument_is_explained():
    rows = dict(table_rows("launch_docker.md"))
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)', read("launch/Dockerfile"), re.MULTILINE))
    assert set(arguments) == set(rows)
    assert arguments["PYTHON"] in rows["PYTHON"]


@pytest.mark.parametrize("page", [*PAGES, "launching.md"])
def test_the_commands_of_the_page_are_taken(page, recorded, fake_python, environment, tmp_path):
    """With programs in the place of python, gcloud, kubectl, docker and sbatch."""
    fake_python.plan([0])
    for name in ("gcloud", "kubectl", "docker"):
        recorded.program(name)
    # Instead of the queue: at once.
    recorded.program("srun")
    recorded.program(
        "sbatch",
        "script = next(i for i, a in enumerate(sys.argv) if a.endswith('.sbatch'))\n"
        "os.environ['SLURM_JOB_ID'] = '1'\n"
        "os.execvp('bash', ['bash', *sys.argv[script:]])",
    )
    (recorded.folder / "python").symlink_to(fake_python.path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    env = environment | {"PATH": recorded.path, "PYTHON": str(fake_python.path)}
    blocks = re.findall(r"^```\n(.*?)^```", read(f"docs/{page}"), re.DOTALL | re.MULTILINE)
    script = "set -e\n" + "\n".join(blocks)
    if page == "launch_tpu_vm.md":  # it installs the last commit of a checkout
        script = script.replace("launch/tpu_vm.sh", str(ROOT / "launch" / "tpu_vm.sh"))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    called = {
        "launch_local.md": fake_python.calls(),
        "launching.md": fake_python.calls(),
        "launch_slurm.md": recorded.calls("srun"),
        "launch_tpu_vm.md": recorded.calls("gcloud"),
        "launch_gke.md": recorded.calls("kubectl"),
        "launch_docker.md": recorded.calls("docker"),
    }
    assert called[page]
