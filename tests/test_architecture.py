"""The rooms import only what is below them, and the ground floor imports nothing of them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxllm"

# From the ground up, as in docs/architecture.md; those of one line stand on the same floor.
FLOORS = [
    {"errors", "trees", "files", "config", "preemption", "host_memory", "supervisor"},
    {"tokenizers"},
    {"sharding"},
    {"data"},
    {"reporting"},
    {"ops"},
    {"models"},
    {"conversion"},
    {"checkpoints"},
    {"objectives"},
    {"inference"},
    {"evaluation"},
    {"rewards"},
    {"rollouts"},
    {"training"},
    {"scaling"},
    {"planning"},
    {"stages"},
    {"command_line", "main", "api"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxllm"):
            names = [node.module] if node.module != "jaxllm" else []
            names += [f"jaxllm.{alias.name}" for alias in node.names if node.module == "jaxllm"]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("jaxllm.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_file_imports_no_room_above_its_own(path):
    for imported in imported_rooms(path):
        assert HEIGHT[imported] <= HEIGHT[room(path)], f"{room(path)} imports {imported}"


def test_every_file_says_first_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
