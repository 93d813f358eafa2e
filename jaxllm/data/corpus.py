"""From configuration to tokenised training and held-out text, reusing what was made before.

Under the store's folder lie, each under the fingerprint of all that it depends on:

    DOCUMENTS/documents.json      counts from reading and cleaning the sources
    DOCUMENTS/sides.npy           which documents are trained on, held out, or left out
    DOCUMENTS/TOKENIZER/          token stores: train_00, train_01, … (one a source), and eval;
                                  TOKENIZER is the encoder's fingerprint, where there is one
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxllm.data.config import DataConfig, SourcesConfig
from jaxllm.data.documents import Reader, TextReader
from jaxllm.data.mixture import Entry, parse_entries
from jaxllm.data.selection import (
    EVAL,
    Meter,
    Report,
    SplitDocuments,
    fingerprint_of,
    held_out_documents,
    split_documents,
    train_store,
)
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.data.store import FORMAT_VERSION, Encoder, TokenStore, write_stores
from jaxllm.errors import UserError
from jaxllm.files import locked, write_json
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer, configured_tokenizer, load_tokenizer
from jaxllm.tokenizers.trainers import TRAINERS_VERSION
from jaxllm.tokenizers.training import train_tokenizer

_TRAINED_FROM_FILE = "trained_from.json"


@runtime_checkable
class DocumentKind(Protocol):
    """What is read of records, and how it becomes tokens: what a stage asks of its data."""

    @property
    def reader(self) -> Reader:
        """What a record is read as."""
        ...

    def encoder(self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments) -> Encoder | None:
        """What makes tokens of the documents of `split` for rows of `seq_len` places; None: see
        `write_stores`.

        Raises:
            UserError: it cannot be done with this tokenizer, or these documents.
        """
        ...


class WholeTexts:
    """Texts, all of whose tokens are learnt."""

    reader = TextReader()

    def encoder(self, tokenizer: Tokenizer, seq_len: int, split: SplitDocuments) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready to be cut into rows."""

    tokenizer: Tokenizer
    entries: tuple[Entry, ...]
    """The training sources, in order."""
    train: tuple[TokenStore, ...]
    """The training text of each."""
    eval: TokenStore
    split: SplitDocuments
    encoder: Encoder | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a run must find again when it is resumed."""
        found = {"text": self.split.fingerprint, "tokenizer": self.tokenizer.fingerprint}
        return found | ({"layout": self.encoder.fingerprint} if self.encoder else {})

    def train_texts(self) -> Iterator[str]:
        """The training texts in the order of the sources, read again."""
        return self.split.texts(TRAIN)

    def eval_texts(self) -> Iterator[str]:
        """The texts of `eval`'s documents in its order, read from the sources again."""
        return self.split.texts(HELD_OUT)


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    work_dir: Path,
    report: Report = lambda phase, done, total: None,
    expected: Mapping[str, str] | None = None,
    kind: DocumentKind = WholeTexts(),  # noqa: B008
) -> Corpus:
    """Reads, cleans and splits the sources, trains or loads the tokenizer, and tokenises.

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
        kind: of documents.

    Raises:
        UserError: a source, the tokenizer's path or the vocabulary's size is wrong; there is no
            text; too many lines are bad; or text or tokenizer is not the one expected.
    """
    stores = stores_folder(data, work_dir)
    with locked(stores):
        split = split_documents(data, stores, work_dir, report, kind.reader)
        check_expected(expected, "text", split.fingerprint)
        trained = prepare_tokenizer(tokenizer, split, work_dir, report)
        check_expected(expected, "tokenizer", trained.fingerprint)
        encoder = kind.encoder(trained, data.seq_len, split)
        if encoder:
            check_expected(expected, "layout", encoder.fingerprint)
        opened = _stores(data, split, trained, encoder, stores, report)
    entries = tuple(parse_entries(data.train, "data.train"))
    train = tuple(opened[train_store(number)] for number in range(len(entries)))
    for entry, store in zip(entries, train, strict=True):
        if not store.num_documents:
            reason, hint = "", "leave the source out"
            if store.dropped:  # of conversations alone, which config.preview shows
                reason = (
                    f", or holds nothing to learn ({store.dropped:,}): it is too long for "
                    "config.data.seq_len, or its layout writes no answers"
                )
                hint += ", or look at it with config.preview=8"
            raise UserError(
                f"config.data.train: {entry.name}: none of its text is left to train on; all of "
                f"it is held out, or was left out by config.data.cleaning{reason}; {hint}."
            )
    _check_held_out(opened[EVAL])
    return Corpus(trained, entries, train, opened[EVAL], split, encoder)


def check_expected(
    expected: Mapping[str, str] | None,
    name: str,
    fingerprint: str,
    cause: str = "a source has changed since",
) -> None:
    """Checks that a run that goes on reads what it began with.

    Raises:
        UserError: `expected`, the fingerprints that the run recorded, if any, has another one.
    """
    if expected and expected.get(name) != fingerprint:
        raise UserError(
            f"the {name} is not the one that the run began with ({cause}); "
            "restore it, or begin another run in another --workdir."
        )


def prepare_text(
    data: DataConfig,
    tokenizer: Tokenizer,
    work_dir: Path,
    report: Report = lambda phase, done, total: None,
    kind: DocumentKind = WholeTexts(),  # noqa: B008
) -> tuple[TokenStore, SplitDocuments, Encoder | None]:
    """The text of `data.eval` alone, tokenised, and by what: to measure a model that is already
    there.

    Texts are cleaned one by one; duplicates stay.

    Raises:
        UserError: a source is wrong, there is no text, or too many lines are bad.
    """
    stores = stores_folder(data, work_dir)
    with locked(stores):
        split = held_out_documents(data, stores, work_dir, report, kind.reader)
        encoder = kind.encoder(tokenizer, data.seq_len, split)
        store = _stores(data, split, tokenizer, encoder, stores, report)[EVAL]
    _check_held_out(store)
    return store, split, encoder


def _check_held_out(store: TokenStore) -> None:
    if not store.num_documents:
        raise UserError(
            f"config.data.eval: of the {store.dropped:,} held-out documents none has anything to "
            "predict in the first config.data.seq_len tokens; make that larger."
        )


def stores_folder(data: SourcesConfig, work_dir: Path) -> Path:
    """Where token stores lie."""
    return Path(data.store) if data.store else work_dir / "store"


def prepare_tokenizer(
    config: TokenizerConfig, split: SplitDocuments, work_dir: Path, report: Report
) -> Tokenizer:
    """The tokenizer at `config.path`, or one trained on the training side, now or before.

    Raises:
        UserError: there is none at the path, or the size of the vocabulary is wrong.
    """
    if config.path:
        return configured_tokenizer(config)
    folder = work_dir / "tokenizer"
    fingerprint = fingerprint_of(split.fingerprint, dataclasses.asdict(config), TRAINERS_VERSION)
    wanted = {"fingerprint": fingerprint}
    record = folder / _TRAINED_FROM_FILE
    try:
        if json.loads(record.read_text()) == wanted:
            return load_tokenizer(folder)
    except (OSError, ValueError):  # not trained yet
        pass
    stride = -(-split.train_bytes // config.train_bytes)
    texts = itertools.islice(split.texts(TRAIN), 0, None, stride)
    meter = Meter("train tokenizer", split.train_bytes // stride, report)
    tokenizer = train_tokenizer(config, meter.texts(texts))
    meter.finish()
    record.unlink(missing_ok=True)  # no record while the folder changes
    tokenizer.save(folder)
    write_json(record, wanted)
    return tokenizer


def _stores(
    data: DataConfig,
    split: SplitDocuments,
    tokenizer: Tokenizer,
    encoder: Encoder | None,
    stores: Path,
    report: Report,
) -> dict[str, TokenStore]:
    """The token stores of a split, opened or made."""
    training = len(split.sources) - split.held_out_sources
    names = [EVAL, *(train_store(number) for number in range(training))]
    encoding = (encoder or tokenizer).fingerprint
    folder = stores / split.fingerprint / encoding
    fingerprint = fingerprint_of(split.fingerprint, encoding, FORMAT_VERSION)
    texts = (
        (split.store_of(document, side), document.text) for document, side in split.documents()
    )
    total = split.train_bytes + split.eval_bytes
    existing = _open_stores(folder, names, fingerprint)
    if existing:
        return existing
    report("tokenise", 0, total)
    done = 0

    def progress(bytes_done: int) -> None:
        nonlocal done
        done = bytes_done
        report("tokenise", done, total)

    made = write_stores(
        folder,
        names,
        texts,
        tokenizer,
        fingerprint,
        encoder=encoder,
        progress=progress,
        workers=data.workers,
    )
    report("tokenise", done, done)
    return made


def _open_stores(folder: Path, names: list[str], fingerprint: str) -> dict[str, TokenStore]:
    """The stores in `folder` if all are whole and the ones wanted; else none."""
    try:
        stores = {name: TokenStore.open(folder / name) for name in names}
    except UserError:
        return {}
    wanted = all(store.fingerprint == fingerprint for store in stores.values())
    return stores if wanted else {}
