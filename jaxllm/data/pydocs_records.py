"""Labelled records made of the Python documentation: questions, preferences, topics."""

import collections
import functools
import hashlib
import re
from collections.abc import Callable

from jaxllm.data.pydocs import Definition, Item, definitions

Question = tuple[str, str, str]
"""Instruction, input and output."""

# Topics of `classifications`, each with packages and modules that are about it.
_TOPICS = {
    "concurrency": """asyncio concurrent multiprocessing queue sched selectors signal subprocess
        threading""",
    "files": """bz2 dbm filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib
        posixpath shelve shutil stat tarfile tempfile zipfile zipimport""",
    "interfaces": "argparse cmd curses getopt optparse tkinter turtle turtledemo",
    "language": """abc ast code codeop collections compileall contextlib copy dataclasses dis enum
        functools importlib inspect modulefinder pickle pickletools pkgutil pyclbr pydoc runpy
        symtable tokenize types typing weakref""",
    "network and mail": """asynchat asyncore cgi email ftplib http imaplib ipaddress mailbox
        mailcap mimetypes nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib
        webbrowser wsgiref xmlrpc""",
    "numbers and time": """bisect calendar colorsys datetime decimal fractions heapq numbers
        operator random secrets statistics uuid zoneinfo""",
    "testing": """bdb cProfile doctest logging pdb profile pstats timeit trace traceback
        tracemalloc unittest warnings""",
    "text": """base64 codecs configparser csv difflib gettext html json locale plistlib pprint
        quopri re shlex string stringprep textwrap tomllib xml xdrlib""",
}
_MOST_OF_A_TOPIC = 300  # records; so that no topic is much more frequent than another
_MOST_OF_A_MODULE = 60  # records; so that no topic is one module

# Words that end no sentence: an answer that is cut after one is not whole by accident.
_UNFINISHED = re.compile(
    r"[ \n](?:a|an|and|are|as|at|because|but|can|for|from|if|into|is|its|may|must|of|or|than|that|"
    r"the|to|when|whether|which|will|with)(?=[ \n]\S)"
)


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
    long as the right one; two are the right one cut short inside a sentence, and two say one
    sentence repeatedly. Definitions of which none can be made are left out.
    """
    modules: dict[str, list[Definition]] = {}
    for definition in sorted(definitions(), key=lambda found: len(found.answer)):
        modules.setdefault(definition.module, []).append(definition)
    items = []
    for definition in _shuffled("preferences"):
        if rejected := _rejected(definition, modules[definition.module]):
            fields = {
                "prompt": definition.question,
                "chosen": definition.answer,
                "rejected": rejected,
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
        if topic is None or package.lower() in re.findall(r"[a-z0-9]+", text.lower()):
            continue
        if taken[topic] < _MOST_OF_A_TOPIC and taken[definition.module] < _MOST_OF_A_MODULE:
            taken.update([topic, definition.module])
            items.append((definition.group, {"text": text, "label": topic}))
    return tuple(items)


def _shuffled(purpose: str) -> list[Definition]:
    """The definitions in a random order, the same each time."""
    return sorted(definitions(), key=lambda definition: _pick(1 << 64, purpose, definition.path))


def _pick(below: int, *key: str) -> int:
    """One of `0 … below - 1`, which the key alone decides."""
    digest = hashlib.blake2b("\n".join(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % below


def _rejected(definition: Definition, peers: list[Definition]) -> str | None:
    """A worse answer, or none; `peers` are the definitions of the module, by length of their
    answers.
    """
    kind = _pick(10, "worse", definition.path)
    if kind < 6 and len(peers) > 1:
        place = peers.index(definition)
        place += -1 if place == len(peers) - 1 or (place and _pick(2, definition.path)) else 1
        # What begins with the same sentence would be right as well.
        return peers[place].answer if peers[place].sentence != definition.sentence else None
    if kind < 8:
        return _cut_short(definition)
    return " ".join([definition.sentence] * (2 + _pick(3, "repeat", definition.path)))


def _cut_short(definition: Definition) -> str | None:
    """The first 40 to 80 % of the answer, ending inside a sentence; none if that cannot be."""
    answer = definition.answer
    ends = [match.end() for match in _UNFINISHED.finditer(answer)]
    ends = [end for end in ends if 0.4 * len(answer) <= end <= 0.8 * len(answer)]
    return answer[: ends[_pick(len(ends), "cut", definition.path)]] if ends else None


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
