"""From configuration to tokenised training and held-out text, reusing what was made before.

Under the store's folder lie, each under the fingerprint of all that it depends on:

    DOCUMENTS/documents.json      counts from reading the sources
    DOCUMENTS/held_out.npy        which documents are held out
    DOCUMENTS/TOKENIZER/train     token store of the training text
    DOCUMENTS/TOKENIZER/eval      token store of the held-out text
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxllm.data.config import DataConfig
from jaxllm.data.documents import Document, RejectedLines, Source, read_documents
from jaxllm.data.sources import parse_sources
from jaxllm.data.split import SPLIT_VERSION, held_out
from jaxllm.data.store import FORMAT_VERSION, TokenStore, write_store
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer
from jaxllm.tokenizers.training import train_tokenizer

Report = Callable[[str, int, int], None]
"""Progress: called with a phase (`read`, `train tokenizer`, `tokenise train`, `tokenise eval`),
the UTF-8 bytes done, and the bytes in all, 0 while they are not known. A phase begins with 0 done
and ends with all done; one whose result is reused is not reported at all."""

REJECTED_FILE = "rejected.jsonl"
_DOCUMENTS_FILE = "documents.json"
_HELD_OUT_FILE = "held_out.npy"
_TRAINED_FROM_FILE = "trained_from.json"
_REPORT_EVERY = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class SplitDocuments:
    """The documents of a configuration, and the side of the held-out split each is on."""

    fingerprint: str
    """Hash of the sources and of every option that decides which text is on which side."""
    sources: tuple[Source, ...]
    held_out: Bool[np.ndarray, " documents"]
    train_bytes: int
    eval_bytes: int
    bad_lines: int

    def texts(self, held_out: bool) -> Iterator[str]:
        """The texts of one side in order, read from the sources again."""
        places = np.flatnonzero(self.held_out == held_out)
        sides = self.held_out[: places[-1] + 1]  # stop reading after the last one
        for document, side in zip(read_documents(self.sources, 1.0), sides, strict=False):
            if side == held_out:
                yield document.text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready to be cut into rows."""

    tokenizer: Tokenizer
    train: TokenStore
    eval: TokenStore
    split: SplitDocuments

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a run must find again when it is resumed."""
        return {"text": self.split.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    @property
    def bad_lines(self) -> int:
        """Lines set aside; they are listed in the work directory's `rejected.jsonl`."""
        return self.split.bad_lines

    def train_texts(self) -> Iterator[str]:
        """The texts of `train`'s documents in its order, read from the sources again."""
        return self.split.texts(held_out=False)

    def eval_texts(self) -> Iterator[str]:
        """The texts of `eval`'s documents in its order, read from the sources again."""
        return self.split.texts(held_out=True)


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    work_dir: Path,
    report: Report = lambda phase, done, total: None,
    expected: Mapping[str, str] | None = None,
) -> Corpus:
    """Reads and splits the sources, trains or loads the tokenizer, and tokenises both sides.

    Whatever an earlier call finished from the same sources and options is opened instead. A
    tokenizer is trained on the training side alone and kept in `work_dir/tokenizer`. Lines that
    cannot be used are listed in `work_dir/rejected.jsonl`.

    Args:
        data: sources, split and where token stores lie.
        tokenizer: what to train, or the path of one to use.
        work_dir: the run's folder; made if need be.
        report: told of progress.
        expected: the `Corpus.fingerprints` that a run began with; nothing is written before the
            text has been found to be the same.

    Raises:
        UserError: a source, the tokenizer's path or the vocabulary's size is wrong; there is no
            text; too many lines are bad; or text or tokenizer is not the one expected.
    """
    stores = _stores(data, work_dir)
    split = _split_documents(data, stores, work_dir, report)
    _check_expected(expected, "text", split.fingerprint)
    trained = _tokenizer(tokenizer, split, work_dir, report)
    _check_expected(expected, "tokenizer", trained.fingerprint)
    folder = stores / split.fingerprint / trained.fingerprint
    fingerprint = _hash(split.fingerprint, trained.fingerprint, FORMAT_VERSION)

    def store(side: str, total: int) -> TokenStore:
        texts = split.texts(held_out=side == "eval")
        return _store(folder / side, texts, trained, fingerprint, f"tokenise {side}", total, report)

    return Corpus(
        tokenizer=trained,
        train=store("train", split.train_bytes),
        eval=store("eval", split.eval_bytes),
        split=split,
    )


def _check_expected(expected: Mapping[str, str] | None, name: str, fingerprint: str) -> None:
    if expected and expected.get(name) != fingerprint:
        raise UserError(
            f"the {name} is not the one that the run began with (a source has changed since); "
            "restore it, or begin another run in another --workdir."
        )


def prepare_text(
    data: DataConfig,
    tokenizer: Tokenizer,
    work_dir: Path,
    report: Report = lambda phase, done, total: None,
) -> TokenStore:
    """The text of `data.eval` alone, tokenised: to measure a model that is already there.

    Raises:
        UserError: a source is wrong, there is no text, or too many lines are bad.
    """
    sources = parse_sources(data.eval, "data.eval", data.parse_special_tokens)
    fingerprint = _hash(
        [(source.name, source.fingerprint()) for source in sources],
        data.parse_special_tokens,
        tokenizer.fingerprint,
        FORMAT_VERSION,
    )
    folder = _stores(data, work_dir) / fingerprint
    work_dir.mkdir(parents=True, exist_ok=True)
    with RejectedLines(work_dir / REJECTED_FILE) as rejected:
        documents = read_documents(sources, data.max_bad_fraction, rejected)
        texts = (document.text for document in documents)
        store = _store(folder, texts, tokenizer, fingerprint, "tokenise eval", 0, report)
    if not store.num_documents:
        raise UserError(f"config.data.eval: there is no text in {data.eval}.")
    return store


def _stores(data: DataConfig, work_dir: Path) -> Path:
    return Path(data.store) if data.store else work_dir / "store"


def _store(
    path: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    fingerprint: str,
    phase: str,
    total: int,
    report: Report,
) -> TokenStore:
    """The store at `path` if it is the one wanted, or a new one of `texts`."""
    existing = _open_store(path, fingerprint)
    if existing is not None:
        return existing
    report(phase, 0, total)
    done = 0

    def progress(bytes_done: int) -> None:
        nonlocal done
        done = bytes_done
        report(phase, done, total)

    store = write_store(path, texts, tokenizer, fingerprint, progress)
    report(phase, done, done)
    return store


def _split_documents(
    data: DataConfig, stores: Path, work_dir: Path, report: Report
) -> SplitDocuments:
    """The split made before from the same sources and options, or a new one."""
    train = parse_sources(data.train, "data.train", data.parse_special_tokens)
    evaluation = parse_sources(data.eval, "data.eval", data.parse_special_tokens)
    fingerprint = _hash(
        [(source.name, source.fingerprint()) for source in train],
        [(source.name, source.fingerprint()) for source in evaluation],
        (data.eval_fraction, data.parse_special_tokens, data.max_bad_fraction),
        SPLIT_VERSION,
    )
    folder = stores / fingerprint
    try:
        counts = json.loads((folder / _DOCUMENTS_FILE).read_text())
        sides = np.load(folder / _HELD_OUT_FILE)
        if (folder / REJECTED_FILE).exists() and not (work_dir / REJECTED_FILE).exists():
            work_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / REJECTED_FILE, work_dir / REJECTED_FILE)
    except (OSError, EOFError, ValueError):
        with RejectedLines(work_dir / REJECTED_FILE) as rejected:
            meter = _Meter("read", 0, report)
            sides, sizes = _read_sides(data, train, evaluation, rejected, meter)
            meter.finish()
        counts = {
            "train_bytes": int(sizes[~sides].sum()),
            "eval_bytes": int(sizes[sides].sum()),
            "bad_lines": rejected.bad,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if rejected.bad:
            shutil.copyfile(rejected.path, folder / REJECTED_FILE)
        np.save(folder / _HELD_OUT_FILE, sides)
        write_json(folder / _DOCUMENTS_FILE, counts)  # last: it says that the rest is whole
    # Held-out sources come first, so that reading them again ends before the training text.
    return SplitDocuments(fingerprint, (*evaluation, *train), sides, **counts)


def _read_sides(
    data: DataConfig,
    train: list[Source],
    evaluation: list[Source],
    rejected: RejectedLines,
    meter: "_Meter",
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each document is held out, and its UTF-8 bytes."""
    sizes: list[int] = []

    def documents(sources: list[Source], field: str, names: str) -> Iterator[Document]:
        before = len(sizes)
        for document in read_documents(sources, data.max_bad_fraction, rejected):
            sizes.append(len(document.text.encode()))
            meter.add(sizes[-1])
            yield document
        if len(sizes) == before:
            raise UserError(f"config.{field}: there is no text in {names}.")

    if evaluation:
        held = sum(1 for _ in documents(evaluation, "data.eval", data.eval))
        trained = sum(1 for _ in documents(train, "data.train", data.train))
        sides = np.arange(held + trained) < held
    else:
        sides = held_out(documents(train, "data.train", data.train), data.eval_fraction)
    return sides, np.array(sizes, np.int64)


def _tokenizer(
    config: TokenizerConfig, split: SplitDocuments, work_dir: Path, report: Report
) -> Tokenizer:
    """The tokenizer at `config.path`, or one trained on the training side, now or before."""
    if config.path:
        try:
            return load_tokenizer(config.path)
        except UserError as error:
            raise UserError(f"config.tokenizer.path: {error}") from None
    folder = work_dir / "tokenizer"
    wanted = {"fingerprint": _hash(split.fingerprint, dataclasses.asdict(config))}
    record = folder / _TRAINED_FROM_FILE
    if record.exists() and json.loads(record.read_text()) == wanted:
        return load_tokenizer(folder)
    meter = _Meter("train tokenizer", split.train_bytes, report)
    tokenizer = train_tokenizer(config, meter.texts(split.texts(held_out=False)))
    meter.finish()
    record.unlink(missing_ok=True)  # no record while the folder changes
    tokenizer.save(folder)
    write_json(record, wanted)
    return tokenizer


def _open_store(path: Path, fingerprint: str) -> TokenStore | None:
    """The store at `path` if it is whole and is the one wanted."""
    try:
        store = TokenStore.open(path)
    except UserError:
        return None
    return store if store.fingerprint == fingerprint else None


class _Meter:
    """Reports bytes done, a megabyte at a time."""

    def __init__(self, phase: str, total: int, report: Report):
        self._phase, self._total, self._report = phase, total, report
        self._done = self._reported = 0
        report(phase, 0, total)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done - self._reported >= _REPORT_EVERY:
            self._reported = self._done
            self._report(self._phase, self._done, self._total)

    def texts(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self.add(len(text.encode()))

    def finish(self) -> None:
        self._report(self._phase, self._done, self._done)


def _hash(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
