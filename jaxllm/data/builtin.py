"""Built-in sources: text that lies on every machine with Python, so nothing is downloaded.

`builtin:pydocs` is English prose and code: the chapters of the language reference that Python's
`help()` shows, and for each module of the standard library a page of its documentation, made of
its docstrings, and its source without them. Modules are only read and parsed, never imported.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxllm.data.documents import BadLine, Document, Source
from jaxllm.errors import UserError

BUILTIN_PREFIX = "builtin:"

# Tests and bundled installers are not what a reader of documentation looks for; `encodings` is
# code-page tables; `pydoc_data` is the reference itself, read as prose instead.
_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data"),
    *("__pycache__", "__phello__"),
}
_SHORTEST_PAGE = 200  # characters: a page below it is little more than names


def builtin_source(entry: str, field: str) -> Source:
    """The source of `builtin:NAME`.

    Raises:
        UserError: no built-in source has that name; the known ones are listed.
    """
    name = entry.removeprefix(BUILTIN_PREFIX)
    if name not in BUILTINS:
        known = ", ".join(BUILTIN_PREFIX + name for name in BUILTINS)
        raise UserError(f"config.{field}: {entry}: there is no such source; known are {known}.")
    return BUILTINS[name]


@dataclasses.dataclass(frozen=True)
class PythonDocumentation:
    """The documentation and sources of the Python that runs, about 12 MB."""

    name: str = "builtin:pydocs"

    def fingerprint(self) -> str:
        """Hash of the files that the documents are made of."""
        digest = hashlib.blake2b(digest_size=16)
        for path in [*_topics_files(), *_module_files().values()]:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def records(self) -> Iterator[list[Document] | BadLine]:
        """One record for each chapter, and one for each module (page and source)."""
        for group, texts in _python_documentation():
            yield [Document(text, group, self.name) for text in texts]


BUILTINS: dict[str, Source] = {"pydocs": PythonDocumentation()}


@functools.cache  # read several times (split, tokenizer, store), and parsing it takes seconds
def _python_documentation() -> tuple[tuple[str, tuple[str, ...]], ...]:
    records: list[tuple[str, tuple[str, ...]]] = []
    for path in _topics_files():
        for topic, text in _topics(path.read_text(encoding="utf-8")).items():
            records.append((f"pydocs:topic:{topic}", (text,)))
    for module, path in _module_files().items():
        try:
            source = path.read_bytes().decode("utf-8")
            with warnings.catch_warnings():  # of old escape sequences in someone else's strings
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (ValueError, SyntaxError):  # a test fixture or template that is not a module
            continue
        if source.strip():
            page = module_page(module, tree)
            if len(page) >= _SHORTEST_PAGE:
                texts: tuple[str, ...] = (page, without_docstrings(source, tree))
            else:
                texts = (source,)
            records.append((f"pydocs:module:{module}", texts))
    return tuple(records)


def _topics_files() -> list[Path]:
    # Some distributions ship Python without it.
    spec = importlib.util.find_spec("pydoc_data")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [path for folder in folders if (path := Path(folder) / "topics.py").is_file()]


def _topics(source: str) -> dict[str, str]:
    """The literal dict that `pydoc_data.topics` assigns, without running the module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(sorted(ast.literal_eval(node.value).items()))
    return {}


def _module_files() -> dict[str, Path]:
    """Dotted name → file of each module of the standard library kept, in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for folder, subfolders, files in os.walk(root):
        # No identifiers: `site-packages`, and build settings such as those of the folder
        # `config-3.11-x86_64-linux-gnu`, to which `_sysconfigdata` belongs too.
        subfolders[:] = [
            name for name in subfolders if name.isidentifier() and name not in _LEFT_OUT
        ]
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and stem.isidentifier() and "_sysconfigdata" not in stem:
                parts = (*Path(folder).relative_to(root).parts, stem)
                modules[".".join(parts).removesuffix(".__init__")] = Path(folder, name)
    return dict(sorted(modules.items()))


def module_page(module: str, tree: ast.Module) -> str:
    """A page like `help(module)`: docstrings under the signatures they belong to."""
    lines = [module, ""]
    lines += (ast.get_docstring(tree) or "").splitlines()
    for node in tree.body:
        lines += _entry(node, "")
    return "\n".join(line.rstrip() for line in lines).strip() + "\n"


def without_docstrings(source: str, tree: ast.Module) -> str:
    """`source` without the lines of its docstrings, so that no text stands in a corpus twice.

    A docstring that is all of a body, or shares a line with code, stays.
    """
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) or not ast.get_docstring(node, clean=False):
            continue
        docstring, *rest = node.body
        lines = range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
        heading = 0 if isinstance(node, ast.Module) else node.lineno
        if rest and rest[0].lineno not in lines and heading not in lines:
            dropped.update(lines)
    lines_of_source = source.splitlines(keepends=True)
    return "".join(line for n, line in enumerate(lines_of_source, 1) if n not in dropped)


def _entry(node: ast.stmt, indent: str) -> list[str]:
    """The lines of a function, or of a class and its methods; none when it has no docstring."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return []
    docstring = ast.get_docstring(node) or ""
    inner = indent + "    "
    lines = [inner + line for line in docstring.splitlines()]
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        heading = f"class {node.name}({bases})" if bases else f"class {node.name}"
        for child in node.body:
            lines += _entry(child, inner)
    else:
        heading = f"{node.name}({ast.unparse(node.args)})"
    return ["", indent + heading, *lines] if lines else []
