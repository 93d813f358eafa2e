"""launch/Dockerfile: copies what is there and what .dockerignore lets through, and is not root."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions():
    text = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(None, 1) for line in text.splitlines() if line.strip()]


def test_every_instruction_is_known(instructions):
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "ENTRYPOINT"}
    assert {name for name, _ in instructions} == known
    assert [name for name, _ in instructions][:2] == ["ARG", "FROM"]


def test_what_is_copied_is_there_and_not_ignored(instructions):
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [
        source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_extras_are_those_of_the_package(instructions):
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
    for extra in re.findall(r"EXTRA=(\w+)", text):
        assert extra in setup["options.extras_require"]


def test_the_program_runs_without_root(instructions):
    names = [name for name, _ in instructions]
    user = dict(instructions)["USER"]
    assert not user.startswith(("0", "root"))
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "RUN" not in names[names.index("USER") :]
    assert dict(instructions)["ENTRYPOINT"] == '["python", "-m", "jaxllm.main"]'


def test_the_manifests_call_a_script_that_the_image_has(instructions):
    copied = [rest.split()[-1] for name, rest in instructions if name == "COPY"]
    workdir = dict(instructions)["WORKDIR"]
    for kind in ("tpu", "gpu"):
        manifest = (ROOT / "launch" / "gke" / f"{kind}.yaml").read_text(encoding="utf-8")
        (script,) = set(re.findall(r"/\S*start\.sh", manifest))
        assert script.removeprefix(f"{workdir}/") in copied
