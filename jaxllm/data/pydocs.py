"""The Python documentation as a corpus, and as labelled records made of it.

The corpus is English prose and code: the chapters of the language reference that Python's `help()`
shows, and for each module of the standard library a page of its documentation, made of its
docstrings, and its source without them. Modules are only read and parsed, never imported.
"""

import ast
import collections
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

PYDOCS_VERSION = 1
"""Changes when the same files may give other records."""

Item = tuple[str, dict[str, str]]
"""A record's group, and its fields by name."""

Question = tuple[str, str, str]
"""Instruction, input and output."""

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

# Topics of `classifications`, each with packages and modules that are about it.
_TOPICS = {
    "concurrency": """asyncio concurrent multiprocessing queue sched selectors signal subprocess
        threading""",
    "files": """_pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib
        posixpath shelve shutil stat tarfile tempfile zipfile zipimport""",
    "interfaces": "argparse cmd curses getopt optparse tkinter turtle turtledemo",
    "language": """_collections_abc abc ast code codeop collections compileall contextlib copy
        dataclasses dis enum functools importlib inspect modulefinder pickle pickletools pkgutil
        pyclbr pydoc runpy symtable tokenize types typing weakref""",
    "network and mail": """asynchat asyncore cgi email ftplib http imaplib ipaddress mailbox
        mailcap mimetypes nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib
        webbrowser wsgiref xmlrpc""",
    "numbers and time": """_pydatetime _pydecimal _strptime bisect calendar colorsys datetime
        decimal fractions heapq numbers operator random secrets statistics uuid zoneinfo""",
    "testing": """bdb cProfile doctest logging pdb profile pstats timeit trace traceback
        tracemalloc unittest warnings""",
    "text": """_markupbase base64 codecs configparser csv difflib gettext html json locale plistlib
        pprint quopri re shlex string stringprep textwrap tomllib xml xdrlib""",
}
_MOST_OF_A_TOPIC = 350  # records; so that no topic is much more frequent than another
_MOST_OF_A_MODULE = 60  # records; so that no topic is one module


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
        return self.docstring if len(self.docstring) <= _LONGEST_ANSWER else self._paragraph

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, in one line."""
        paragraph = " ".join(self._paragraph.split())
        return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]

    @property
    def _paragraph(self) -> str:
        return self.docstring.split("\n\n")[0]


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
    """The corpus, about 12 MB: chapters, then for each module its page and its source."""
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
    """What the standard library defines under public names; no two have one answer."""
    found: dict[str, Definition] = {}  # by answer
    for module, source, tree in _modules():
        lines = source.splitlines()
        for definition in [_module_definition(module, tree), *_definitions(module, tree, lines)]:
            if _PROSE.match(definition.sentence):
                found.setdefault(definition.answer, definition)
    # Of an accessor and its setter, which share a name, one is enough.
    return tuple({definition.path: definition for definition in found.values()}.values())


@functools.cache
def instructions() -> tuple[Item, ...]:
    """Questions about what the standard library defines, in several forms: one a definition."""
    items: dict[tuple[str, str], Item] = {}
    for definition in _shuffled("instructions"):
        first = _pick(len(_QUESTIONS), "question", definition.path)
        made = (question(definition) for question in _QUESTIONS[first:] + _QUESTIONS[:first])
        instruction, context, output = next(filter(None, made))
        fields = {"instruction": instruction, "input": context, "output": output}
        items.setdefault((instruction, context), (definition.group, fields))
    return tuple(items.values())


@functools.cache
def preferences() -> tuple[Item, ...]:
    """What a function or class does, told by its own docstring, and by something worse.

    Of ten rejected answers about six are the docstring of another definition in the module, as
    long as the right one; two are the right one cut short, and two say one sentence repeatedly.
    """
    modules: dict[str, list[Definition]] = {}
    for definition in sorted(definitions(), key=lambda found: len(found.answer)):
        modules.setdefault(definition.module, []).append(definition)
    items = []
    for definition in _shuffled("preferences"):
        fields = {
            "prompt": definition.question,
            "chosen": definition.answer,
            "rejected": _rejected(definition, modules[definition.module]),
        }
        items.append((definition.group, fields))
    return tuple(items)


@functools.cache
def classifications() -> tuple[Item, ...]:
    """Docstrings and the topic of the module each is from; topics are about equally frequent.

    One that names the package it is from is left out, and so is much of a large module.
    """
    topics = {package: topic for topic, text in _TOPICS.items() for package in text.split()}
    taken: collections.Counter[str] = collections.Counter()
    items = []
    for definition in _shuffled("classifications"):
        package = definition.module.split(".")[0]
        topic, text = topics.get(package), definition.answer
        if topic is None or package.strip("_").lower() in re.findall(r"[a-z0-9]+", text.lower()):
            continue
        if taken[topic] < _MOST_OF_A_TOPIC and taken[definition.module] < _MOST_OF_A_MODULE:
            taken.update([topic, definition.module])
            items.append((definition.group, {"text": text, "label": topic}))
    return tuple(items)


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


def _shuffled(purpose: str) -> list[Definition]:
    """The definitions in a random order, the same each time."""
    return sorted(definitions(), key=lambda definition: _pick(1 << 64, purpose, definition.path))


def _pick(below: int, *key: str) -> int:
    """One of `0 … below - 1`, which the key alone decides."""
    digest = hashlib.blake2b("\n".join(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % below


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


def _rejected(definition: Definition, peers: list[Definition]) -> str:
    """A worse answer; `peers` are the definitions of the module, by length of their answers."""
    kind, answer = _pick(10, "worse", definition.path), definition.answer
    if kind < 6 and len(peers) > 1:
        place = peers.index(definition)
        place += -1 if place == len(peers) - 1 or (place and _pick(2, definition.path)) else 1
        return peers[place].answer
    if kind < 8:
        kept = len(answer) * (40 + _pick(40, "cut", definition.path)) // 100
        return answer[:kept].rsplit(maxsplit=1)[0]
    return " ".join([definition.sentence] * (2 + _pick(3, "repeat", definition.path)))


def _purpose(definition: Definition) -> Question | None:
    return definition.question, "", definition.answer


def _explanation(definition: Definition) -> Question | None:
    if definition.kind == "module" or definition.answer != definition.docstring:
        return None
    asked = f"Explain this {definition.kind} of the Python module `{definition.module}`."
    return asked, definition.signature, definition.docstring


def _arguments(definition: Definition) -> Question | None:
    if definition.kind != "function":
        return None
    return f"What is the signature of `{definition.path}` in Python?", "", definition.signature


def _summary(definition: Definition) -> Question | None:
    if definition.answer == definition.sentence:
        return None
    return (
        "Give the main point of this text in one sentence.",
        definition.answer,
        definition.sentence,
    )


def _opening(definition: Definition) -> Question | None:
    if definition.kind != "function":
        return None
    asked = "Write the first sentence of a docstring for this Python function."
    return asked, definition.code, definition.sentence


_QUESTIONS: list[Callable[[Definition], Question | None]] = [
    _purpose,
    _explanation,
    _arguments,
    _summary,
    _opening,
]
