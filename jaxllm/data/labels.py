"""Labelled texts: records of a text and what it is, as tokens and the number of the label.

A text becomes `bos`, its tokens, `eos`, and behind them, where a next token would stand, the number
of its label, which alone is to be predicted: the target of the text's last token. So labelled texts
lie in token stores, and are packed into rows, like any others:

    x  bos  7  3  9  eos          targets  7  3  9  eos  2      2: the third label
    w   0   0  0  0   1

Of `single_label` the number is that of the class; of `multi_label` and `regression` that of a row
of a table, which holds each set of classes, or each value, once.
"""

import collections
import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxllm.data.cleaning import Cleaner
from jaxllm.data.documents import Passage
from jaxllm.data.records import Record
from jaxllm.data.selection import SplitDocuments
from jaxllm.data.split import TRAIN
from jaxllm.data.store import Encoded
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.tokenizers.tokenizer import Tokenizer

LABELS_VERSION = 1
"""Changes when the same record may become other tokens."""

KINDS = ("single_label", "multi_label", "regression")

Class = int | str
Label = Class | float | tuple[Class, ...]
"""A class, a value, or a set of classes, sorted."""

_SHOWN = 8  # labels in a message


@dataclasses.dataclass(frozen=True)
class Labels:
    """What texts may be, in the order of a model's outputs."""

    kind: str
    """One of `KINDS`."""
    names: tuple[Class, ...]
    """The classes; none of `regression`."""
    counts: tuple[int, ...]
    """How many training texts have each."""
    texts: int
    """How many training texts there are."""
    mean: float = 0.0
    """Of the values of training texts; of `regression` the model predicts (value - mean) /
    deviation."""
    deviation: float = 1.0

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a text: a logit for each class, or one value."""
        return len(self.names) or 1

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Labels":
        """Those that `save` wrote.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            names, counts = tuple(fields.pop("names")), tuple(fields.pop("counts"))
            return cls(names=names, counts=counts, **fields)
        except FileNotFoundError:
            raise UserError(
                f"{path.parent}: is no run of the stage classify (it has no {path.name})."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from None


@dataclasses.dataclass(frozen=True)
class LabelledReader:
    """Reads a record as a text and its label; see `documents.Reader`."""

    kind: str
    text: tuple[str, ...]
    """Fields whose texts are joined by new lines."""
    label: str
    """The field of the label."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `documents.Reader`."""
        return (f"labelled texts {LABELS_VERSION}", self.kind, *self.text, self.label)

    def __call__(self, record: Record, marked: bool, clean: Cleaner) -> list[Passage]:
        """One passage of JSON: `{"text": …, "label": …}`; the same texts belong together.

        Raises:
            ValueError: the record has no such text or label; the message says why.
        """
        del marked  # a labelled text is one text
        text = clean(joined_text(record.fields, self.text))
        if self.label not in record.fields:
            named = ", ".join(map(str, record.fields)) or "none"
            raise ValueError(f"no field `{self.label}` (it has {named})")
        label = read_label(record.fields[self.label], self.kind)
        if not text:
            return []
        group = hashlib.blake2b(text.encode(), digest_size=16, key=b"labelled").hexdigest()
        labelled = json.dumps({"text": text, "label": label}, ensure_ascii=False)
        return [Passage(labelled, record.group or group)]


def joined_text(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The texts of the named fields of a record, as one.

    Raises:
        ValueError: one is missing, or no text.
    """
    return "\n".join(_text(fields, name) for name in names)


def read_label(value: Any, kind: str) -> Label:
    """The label that a record holds.

    Raises:
        ValueError: it is none of this kind; the message says why.
    """
    if kind == "regression":
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the label {_shortened(value)} is no number")
        return number
    if kind == "single_label":
        return _class(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"the label {value!r} is no list of classes")
    return tuple(sorted({_class(each) for each in value}, key=_order))


def _shortened(value: Any) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return "with so many digits"


def _class(value: Any) -> Class:
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, str) and value.strip():
        return _unicode(value, f"the label {value!r}")
    if isinstance(value, float):
        raise ValueError(
            f"the label {value!r} is a number and no class; write it as text, or, to predict "
            "numbers, give config.classify.kind=regression"
        )
    if isinstance(value, list | tuple):
        raise ValueError(
            f"the label {value!r} is a list; give config.classify.kind=multi_label for texts of "
            "several classes"
        )
    raise ValueError(f"the label {value!r} is no text and no whole number")


def _order(name: Class) -> tuple[bool, int, str]:
    """Whole numbers first, by size; then texts."""
    return isinstance(name, str), name if isinstance(name, int) else 0, str(name)


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"no field `{name}` (it has {', '.join(map(str, fields)) or 'none'})")
    text = fields[name]
    if not isinstance(text, str):
        raise ValueError(f"`{name}` is not a string but {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"`{name}` is empty")
    return _unicode(text, f"`{name}`")


def _unicode(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not Unicode text (a lone surrogate)") from None
    return text


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    """Which fields of a record are text and label, and what a label is."""

    kind: str = "single_label"
    """What a text is given: one class (`single_label`), any number of classes (`multi_label`: the
    label is a list), or a number (`regression`)."""
    text: str = "text"
    """Field of the text; several, separated by commas, are joined by new lines."""
    label: str = "label"
    """Field of the label. A class is a text or a whole number."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}; was {self.kind!r}")
        if not self.label.strip():
            raise ValueError("label: names no field")
        if not self.text_fields:
            raise ValueError("text: names no field")

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The names in `text`."""
        return tuple(filter(None, (name.strip() for name in self.text.split(","))))


@dataclasses.dataclass(frozen=True)
class LabelledKind:
    """Labelled texts as a stage asks for them (`corpus.DocumentKind`)."""

    config: LabelsConfig
    known: Labels | None = None
    """What a model already tells apart; None: what the training texts have."""

    @property
    def reader(self) -> LabelledReader:
        """See `corpus.DocumentKind`."""
        return LabelledReader(self.config.kind, self.config.text_fields, self.config.label)

    def encoder(self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments) -> "LabelledTexts":
        """See `corpus.DocumentKind`; reads the texts for their labels.

        Raises:
            UserError: the training texts have one label only, or others have one that the training
                texts lack.
        """
        training: list[Label] = []
        others: list[Label] = []
        for document, side in split.documents():
            label = json.loads(document.text)["label"]
            label = tuple(label) if isinstance(label, list) else label
            (training if side == TRAIN else others).append(label)
        labels = self.known or labels_of(training, self.config.kind)
        _check_known(labels, others)
        return LabelledTexts(
            labels, label_table(labels, [*training, *others]), tokenizer, seq_len + 1
        )


def labels_of(training: Sequence[Label], kind: str) -> Labels:
    """What the training texts' labels are.

    Raises:
        UserError: they are all the same.
    """
    if len(set(training)) < 2:
        which = repr(training[0]) if training else "missing: there is none"
        raise UserError(
            f"config.data.train: all {len(training):,} training texts have the label {which}; "
            "there is nothing to tell apart. Give texts of others too."
        )
    if kind == "regression":
        values = np.array(training, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(values.mean()), float(values.std())
        if not math.isfinite(mean) or not 0 < deviation < math.inf:
            raise UserError(
                "config.data.train: the labels are too large, or too near each other, to be told "
                "apart as numbers; scale them."
            )
        return Labels(kind, (), (), len(values), mean, deviation)
    found = collections.Counter(name for label in training for name in _classes(label))
    names = tuple(sorted(found, key=_order))
    spelt = collections.Counter(map(str, names))
    if len(spelt) < len(names):
        twice = next(name for name, count in spelt.items() if count > 1)
        raise UserError(
            f"config.data.train: {twice} is a label both as a number and as a text; write it in "
            "one way."
        )
    if kind == "single_label" and len(found) == len(training) > 2:
        raise UserError(
            f"config.data.train: each of the {len(training):,} training texts has a label of its "
            "own; name the field of the class in config.classify.label, or, to predict numbers, "
            "give config.classify.kind=regression."
        )
    return Labels(kind, names, tuple(found[name] for name in names), len(training))


def _check_known(labels: Labels, others: Iterable[Label]) -> None:
    if labels.kind == "regression":
        return
    unseen = collections.Counter(name for label in others for name in _classes(label))
    for name in labels.names:
        del unseen[name]
    if unseen:
        shown = ", ".join(f"{name!r} ({count:,})" for name, count in unseen.most_common(_SHOWN))
        raise UserError(
            f"config.data.eval: held-out texts have labels that no training text has: {shown}"
            f"{', …' if len(unseen) > _SHOWN else ''}; add training texts of each, or leave these "
            "texts out."
        )


def _classes(label: Label) -> tuple[Class, ...]:
    assert not isinstance(label, float)
    return label if isinstance(label, tuple) else (label,)


def label_table(labels: Labels, used: Iterable[Label]) -> dict[Label, int]:
    """The number of each label that is used."""
    if labels.kind == "single_label":
        return {name: number for number, name in enumerate(labels.names)}
    return {label: number for number, label in enumerate(dict.fromkeys(used))}


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """Makes tokens of the texts that `LabelledReader` reads (`store.Encoder`)."""

    labels: Labels
    table: dict[Label, int]
    """The number of each label."""
    tokenizer: Tokenizer
    max_length: int
    """Tokens of a text at most, the label's number counted in: one more than a row has places.
    What is longer loses its end, but keeps `eos`."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what tokens it gives."""
        parts = (
            LABELS_VERSION,
            dataclasses.asdict(self.labels),
            list(self.table.items()),
            self.max_length,
            self.tokenizer.fingerprint,
        )
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    gives_parts = False

    @property
    def ids_below(self) -> int:
        """See `store.Encoder`."""
        return max(self.tokenizer.vocab_size, len(self.table))

    @property
    def targets(self) -> Float32[np.ndarray, "numbers outputs"]:
        """What a model is to give for the label of each number: 1 where the text is of the class,
        else 0; of `regression`, the value less the mean, over the deviation."""
        labels, places = self.labels, {name: at for at, name in enumerate(self.labels.names)}
        found = np.zeros((len(self.table), labels.outputs), np.float32)
        for label, number in self.table.items():
            if isinstance(label, float):
                found[number] = (label - labels.mean) / labels.deviation
            else:
                found[number, [places[name] for name in _classes(label)]] = 1
        return found

    def __call__(self, texts: Sequence[str], workers: int = 0) -> list[Encoded | None]:
        """Tokens of each text, and the number of its label."""
        records = [json.loads(text) for text in texts]
        encoded = self.tokenizer.encode_batch([r["text"] for r in records], workers=workers)
        found: list[Encoded | None] = []
        for record, ids in zip(records, encoded, strict=True):
            label = record["label"]
            number = self.table[tuple(label) if isinstance(label, list) else label]
            whole = text_tokens(self.tokenizer, ids, self.max_length - 1)
            trained = [False] * len(whole) + [True]
            cut = len(ids) > self.max_length - 3
            found.append(Encoded([*whole, number], trained, cut))
        return found


def text_tokens(tokenizer: Tokenizer, ids: Sequence[int], places: int) -> list[int]:
    """What a head reads of a text: `bos`, its tokens as far as they fit, `eos`."""
    return [tokenizer.bos_id, *ids[: places - 2], tokenizer.eos_id]
