"""The Python documentation as a corpus, and what it defines.

The corpus is English prose and code: the chapters of the language reference that Python's `help()`
shows, and for each module of the standard library a page of its documentation, made of its
docstrings, and its source without them. Modules are only read and parsed, never imported.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

PYDOCS_VERSION = 1
"""Changes when the same files may give other records."""

Item = tuple[str, dict[str, str]]
"""A record's group, and its fields by name."""

# Tests and bundled installers are not what a reader of documentation looks for; `encodings` is
# code-page tables; `pydoc_data` is the reference itself, read as prose instead.
_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data"),
    *("__pycache__", "__phello__"),
}
_SHORTEST_PAGE = 200  # characters: a page below it is little more than names
_PROSE = re.compile(r"[A-Za-z][^\s(=]*( \S+){3}")  # four words; no `name(…)`, `x=1` or `>>> …`
_LONGEST_ANSWER = 600  # characters: of a longer docstring the first paragraph has to do
_LONGEST_CODE = 30  # lines that are shown whole


@dataclasses.dataclass(frozen=True)
class Definition:
    """A function, class or module with a docstring of its own."""

    module: str
    path: str
    """Dotted name, beginning with the module."""
    kind: str
    """`function`, `class` or `module`."""
    signature: str
    """`name(arguments)` of a function, `class name(bases)`, or the name of a module."""
    code: str
    """Its source without the docstring, or just the signature when that is long."""
    docstring: str

    @property
    def group(self) -> str:
        """That of the module in `builtin:pydocs`: a split divides all its records alike."""
        return _group(self.module)

    @property
    def question(self) -> str:
        """What `answer` answers."""
        verb, aim = ("does", "do") if self.kind == "function" else ("is", "for")
        return f"What {verb} the Python {self.kind} `{self.path}` {aim}?"

    @property
    def answer(self) -> str:
        """The docstring, or the first paragraph of a long one."""
        return self.docstring if len(self.docstring) <= _LONGEST_ANSWER else self.paragraph

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, in one line."""
        paragraph = " ".join(self.paragraph.split())
        return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]

    @property
    def paragraph(self) -> str:
        """The first paragraph of the docstring."""
        return self.docstring.split("\n\n")[0].rstrip()


def fingerprint() -> str:
    """Hash of the files that everything here is made of."""
    digest = hashlib.blake2b(str(PYDOCS_VERSION).encode(), digest_size=16)
    for path in [*_topics_files(), *_module_files().values()]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache  # read several times (split, tokenizer, store), and parsing it takes seconds
def documents() -> tuple[Item, ...]:
    """The corpus, about 9 MB: chapters, then for each module its page and its source."""
    items: list[Item] = []
    for path in _topics_files():
        for topic, text in _topics(path.read_text(encoding="utf-8")).items():
            items.append((f"pydocs:topic:{topic}", {"text": text}))
    for module, source, tree in _modules():
        texts = [source]
        if len(page := module_page(module, tree)) >= _SHORTEST_PAGE:
            texts = [page, without_docstrings(source, tree)]
        items += [(_group(module), {"text": text}) for text in texts]
    return tuple(items)


@functools.cache
def definitions() -> tuple[Definition, ...]:
    """What public modules of the standard library define under public names.

    No two have one answer. What begins by announcing a list or code, so with a colon at the end of
    its first paragraph, is left out: alone that is no answer.
    """
    found: dict[str, Definition] = {}  # by answer
    for module, source, tree in _modules():
        if any(part.startswith("_") for part in module.split(".")):
            continue
        lines = source.splitlines()
        for definition in [_module_definition(module, tree), *_definitions(module, tree, lines)]:
            if _PROSE.match(definition.sentence) and not definition.paragraph.endswith(":"):
                found.setdefault(definition.answer, definition)
    # Of an accessor and its setter, which share a name, one is enough.
    return tuple({definition.path: definition for definition in found.values()}.values())


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
    inner = indent + "    "
    lines = [inner + line for line in (ast.get_docstring(node) or "").splitlines()]
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            lines += _entry(child, inner)
    return ["", indent + _signature(node), *lines] if lines else []


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"{node.name}({ast.unparse(node.args)})"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def _module_definition(module: str, tree: ast.Module) -> Definition:
    return Definition(module, module, "module", module, module, ast.get_docstring(tree) or "")


def _definitions(
    path: str, parent: ast.Module | ast.ClassDef, lines: list[str], module: str = ""
) -> Iterator[Definition]:
    """The public functions and classes of `parent`, with the public methods of the classes."""
    module = module or path
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        is_class = isinstance(node, ast.ClassDef)
        name = f"{path}.{node.name}"
        yield Definition(
            module=module,
            path=name,
            kind="class" if is_class else "function",
            signature=_signature(node),
            code=_code(node, lines),
            docstring=(ast.get_docstring(node) or "").strip(),
        )
        if isinstance(node, ast.ClassDef):
            yield from _definitions(name, node, lines, module)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The lines of a definition without its docstring; its signature when they are many."""
    body = node.body[0]
    rest = lines[body.end_lineno or body.lineno : node.end_lineno]
    if len(rest) > _LONGEST_CODE or not rest or body.lineno == node.lineno:
        return _signature(node)
    return textwrap.dedent("\n".join([*lines[node.lineno - 1 : body.lineno - 1], *rest]))


def _group(module: str) -> str:
    return f"pydocs:module:{module}"


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


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Name, source and syntax tree of each module that is not empty, in order of name."""
    for module, path in _module_files().items():
        try:
            source = path.read_bytes().decode("utf-8")
            with warnings.catch_warnings():  # of old escape sequences in someone else's strings
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (ValueError, SyntaxError):  # a test fixture or template that is not a module
            continue
        if source.strip():
            yield module, source, tree


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
