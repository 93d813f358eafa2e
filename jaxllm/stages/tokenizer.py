"""The `tokenizer` stage: trains a tokenizer, or several to compare on the same held-out text."""

import dataclasses
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import (
    check_expected,
    prepare_corpus,
    prepare_tokenizer,
    stores_folder,
)
from jaxllm.data.selection import SplitDocuments, split_documents
from jaxllm.data.split import HELD_OUT
from jaxllm.errors import UserError
from jaxllm.files import locked
from jaxllm.models.config import ModelConfig
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.report import write_report
from jaxllm.reporting.tables import print_summary
from jaxllm.stages import pretrain
from jaxllm.tokenizers.comparison import measure
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import configured_tokenizer
from jaxllm.tokenizers.trainers import TRAINERS
from jaxllm.training.loop import EvalConfig
from jaxllm.training.optimizer import OptimizerConfig

_TRAIN_PHASE = "train tokenizer"
_COMPARED = "compared"
_MEASURED_BYTES = 16 << 20  # of held-out text; of more every so-many-th document is taken


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """A small model trained with each tokenizer on equally many bytes of the same text."""

    train_bytes: int = 0
    """UTF-8 bytes of text that each model reads; 0: no models. None is trained for a tokenizer that
    does not give all text back: what it loses would count as predicted."""
    batch_size: int = 8
    """Rows of an update; a row has `data.seq_len` tokens, whatever the tokenizer."""
    seed: int = 0
    """Of initialisation and of the order of rows."""
    model: ModelConfig = ModelConfig(layers=4, width=128, heads=2)
    optimizer: OptimizerConfig = OptimizerConfig("muon", learning_rate=0.01, schedule="linear")

    def __post_init__(self) -> None:
        if self.train_bytes < 0:
            raise ValueError("train_bytes: must not be negative")
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainTokenizerConfig:
    """A tokenizer trained on text; or several, in one table."""

    stage: str = "tokenizer"
    """Always `tokenizer`."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    compare: str = ""
    """Kinds to train and paths of tokenizers to load, separated by commas, instead of the one that
    `tokenizer` describes: each is measured on the same held-out text."""
    comparison: ModelComparison = ModelComparison()


class _Entry(NamedTuple):
    """One tokenizer of a table."""

    name: str
    config: TokenizerConfig
    folder: Path
    """Where its files go."""


def run(config: TrainTokenizerConfig, workdir: Path | None) -> None:
    """Trains or loads each tokenizer, measures it unless that was done, and prints one table."""
    begin = time.monotonic()
    if workdir is None:
        raise UserError("--workdir is missing: give the directory to keep the tokenizer in.")
    entries = _entries(config, workdir)
    directory = RunDirectory(workdir)
    directory.open(dataclasses.asdict(config), dataclasses.asdict(TrainTokenizerConfig()))
    phases = Phases()
    stores = stores_folder(config.data, workdir)
    with locked(stores):
        split = split_documents(config.data, stores, workdir, phases)
    check_expected(directory.data(), "text", split.fingerprint)
    directory.begin(dataclasses.asdict(config), {"text": split.fingerprint})
    scores = directory.final_scores()
    scores["data/train_bytes"] = float(split.train_bytes)
    scores["data/eval_bytes"] = float(split.eval_bytes)
    failed = []
    for entry in entries:
        try:
            scores |= _scores(config, entry, split, stores, phases, scores)
        except UserError as error:
            if len(entries) == 1:
                raise
            failed.append(f"{entry.name}: {error}")
        directory.write_summary(scores)  # what is measured is kept, whatever comes next
    scores.setdefault("time/total", time.monotonic() - begin)
    directory.write_summary(scores)
    report = write_report(workdir)
    print_summary(scores)
    print(f"report: {report}")
    if failed:
        raise UserError(f"not in the table: {'; '.join(failed)}")


def _entries(config: TrainTokenizerConfig, workdir: Path) -> list[_Entry]:
    """What is to be measured; paths are known to hold a tokenizer."""
    names = [entry.strip() for entry in config.compare.split(",") if entry.strip()]
    given = config.tokenizer
    if not names:
        return [_Entry(given.path or given.kind, given, workdir)]
    if len(set(names)) < len(names):
        raise UserError("config.compare: names a tokenizer twice.")
    entries = []
    for name in names:
        if name in TRAINERS:
            tokenizer = TokenizerConfig(name, given.vocab_size, given.train_bytes)
        elif Path(name).exists():
            tokenizer = dataclasses.replace(given, path=name)
            try:
                configured_tokenizer(tokenizer)
            except UserError as error:
                raise UserError(f"config.compare: {name}: {error}") from None
        else:
            known = ", ".join(TRAINERS)
            raise UserError(f"config.compare: {name} is no kind ({known}) and no path.")
        folder = "_".join(part for part in Path(name).parts if part != os.sep)
        entries.append(_Entry(name, tokenizer, workdir / _COMPARED / folder))
    return entries


def _scores(
    config: TrainTokenizerConfig,
    entry: _Entry,
    split: SplitDocuments,
    stores: Path,
    phases: Phases,
    known: Mapping[str, float],
) -> dict[str, float]:
    """The scores of one tokenizer on the held-out text, as far as they are not known."""
    prefix = f"tokenizer/{entry.name}/"
    scores = {}
    if f"{prefix}bytes_per_token" not in known:
        phases.seconds.pop(_TRAIN_PHASE, None)
        scores = {f"{prefix}{name}": v for name, v in _measured(entry, split, phases).items()}
    # Of a text that is not given back bits are left out, so they would flatter.
    lossless = {**known, **scores}[f"{prefix}lossless"] == 1
    bits = f"{prefix}bits_per_byte"
    if config.comparison.train_bytes and lossless and bits not in known:
        scores[bits] = _model_bits(config, entry, stores)
    return scores


def _measured(entry: _Entry, split: SplitDocuments, phases: Phases) -> dict[str, float]:
    """What the tokenizer, trained now or before, makes of the held-out text."""
    tokenizer = prepare_tokenizer(entry.config, split, entry.folder, phases)
    phases.close()  # bytes read no text, so nothing says that they are done
    if entry.config.path:
        tokenizer.save(entry.folder / "tokenizer")
    stride = -(-split.eval_bytes // _MEASURED_BYTES)
    measured = measure(tokenizer, list(itertools.islice(split.texts(HELD_OUT), 0, None, stride)))
    scores = {
        "vocab_size": float(measured.vocab_size),
        "bytes_per_token": measured.bytes_per_token,
        "unknown": measured.unknown_rate,
        "lossless": measured.lossless,
        "megabytes_per_second": measured.megabytes_per_second,
    }
    if _TRAIN_PHASE in phases.seconds:
        scores["train_seconds"] = phases.seconds[_TRAIN_PHASE]
    return scores


def _model_bits(config: TrainTokenizerConfig, entry: _Entry, stores: Path) -> float:
    """Bits per byte of held-out text of a small model that uses the tokenizer of `entry`."""
    given = config.comparison
    data = dataclasses.replace(config.data, store=str(stores))
    tokenizer = TokenizerConfig(path=str(entry.folder / "tokenizer"))
    corpus = prepare_corpus(data, tokenizer, entry.folder)
    tokens = sum(store.num_tokens for store in corpus.train)
    # Sequences of another length cover other numbers of bytes: the bytes are made equal, not the
    # steps.
    wanted = given.train_bytes * tokens / corpus.split.train_bytes
    steps = max(1, round(wanted / (given.batch_size * data.seq_len)))
    run = RunDirectory(entry.folder / "model")
    pretrain.run(
        pretrain.PretrainConfig(
            seed=given.seed,
            steps=steps,
            batch_size=given.batch_size,
            data=data,
            tokenizer=tokenizer,
            model=given.model,
            optimizer=given.optimizer,
            eval=EvalConfig(every=steps, max_batches=1),  # final scores take all of the text
            references=False,
        ),
        run.path,
    )
    return run.final_scores()["eval/bits_per_byte"]
