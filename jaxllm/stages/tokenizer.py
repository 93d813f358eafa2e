"""The `tokenizer` stage: trains a tokenizer, or several to compare on the same held-out text."""

import dataclasses
import time
from pathlib import Path

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus, prepare_tokenizer, stores_folder
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
from jaxllm.tokenizers.trainers import TRAINERS
from jaxllm.training.loop import EvalConfig
from jaxllm.training.optimizer import OptimizerConfig

_TRAIN_PHASE = "train tokenizer"


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """A small model trained with each tokenizer on equally many bytes of the same text."""

    train_bytes: int = 0
    """UTF-8 bytes of text that each model reads; 0: no models."""
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


def run(config: TrainTokenizerConfig, workdir: Path | None) -> None:
    """Trains each tokenizer, or finds it made, measures it, and prints one table."""
    begin = time.monotonic()
    if workdir is None:
        raise UserError("--workdir is missing: give the directory to keep the tokenizer in.")
    directory = RunDirectory(workdir)
    directory.open(dataclasses.asdict(config))
    phases = Phases()
    stores = stores_folder(config.data, workdir)
    with locked(stores):
        split = split_documents(config.data, stores, workdir, phases)
    directory.begin(dataclasses.asdict(config), {"text": split.fingerprint})
    scores = directory.final_scores()
    for name, tokenizer, folder in _tokenizers(config, workdir):
        phases.seconds.pop(_TRAIN_PHASE, None)
        scores |= _measured(tokenizer, name, split, folder, phases)
        if config.comparison.train_bytes:
            bits = _model_bits(config, tokenizer, folder, stores)
            scores[f"tokenizer/{name}/bits_per_byte"] = bits
        directory.write_summary(scores)  # what is measured is kept, whatever comes next
    scores["data/train_bytes"] = float(split.train_bytes)
    scores["data/eval_bytes"] = float(split.eval_bytes)
    scores["time/total"] = time.monotonic() - begin
    directory.write_summary(scores)
    report = write_report(workdir)
    print_summary(scores)
    print(f"report: {report}")


def _tokenizers(
    config: TrainTokenizerConfig, workdir: Path
) -> list[tuple[str, TokenizerConfig, Path]]:
    """Name, configuration and folder of each; a single one lies in the work directory itself."""
    entries = [entry.strip() for entry in config.compare.split(",") if entry.strip()]
    if not entries:
        name = Path(config.tokenizer.path).stem if config.tokenizer.path else config.tokenizer.kind
        return [(name, config.tokenizer, workdir)]
    found = []
    for entry in entries:
        if entry in TRAINERS:
            tokenizer = dataclasses.replace(config.tokenizer, kind=entry, path="")
            found.append((entry, tokenizer, workdir / entry))
        elif Path(entry).exists():
            tokenizer = dataclasses.replace(config.tokenizer, path=entry)
            name = Path(entry).resolve().stem
            found.append((name, tokenizer, workdir / name))
        else:
            raise UserError(
                f"config.compare: {entry} is no kind ({', '.join(TRAINERS)}) and no path."
            )
    return found


def _measured(
    config: TokenizerConfig, name: str, split: SplitDocuments, folder: Path, phases: Phases
) -> dict[str, float]:
    """The scores of one tokenizer on the held-out text."""
    tokenizer = prepare_tokenizer(config, split, folder, phases)
    if config.path:
        tokenizer.save(folder / "tokenizer")
    measured = measure(tokenizer, list(split.texts(HELD_OUT)))
    scores = {
        "vocab_size": float(measured.vocab_size),
        "bytes_per_token": measured.bytes_per_token,
        "unknown": measured.unknown_rate,
        "lossless": measured.lossless,
        "megabytes_per_second": measured.megabytes_per_second,
    }
    if _TRAIN_PHASE in phases.seconds:
        scores["train_seconds"] = phases.seconds[_TRAIN_PHASE]
    return {f"tokenizer/{name}/{score}": value for score, value in scores.items()}


def _model_bits(
    config: TrainTokenizerConfig, tokenizer: TokenizerConfig, folder: Path, stores: Path
) -> float:
    """Bits per byte of held-out text of a small model that uses the tokenizer in `folder`."""
    given = config.comparison
    data = dataclasses.replace(config.data, store=str(stores))
    tokenizer = dataclasses.replace(tokenizer, path=str(folder / "tokenizer"))
    corpus = prepare_corpus(data, tokenizer, folder)
    tokens = sum(store.num_tokens for store in corpus.train)
    # Sequences of another length cover other numbers of bytes: the bytes are made equal, not the
    # steps.
    wanted = given.train_bytes * tokens / corpus.split.train_bytes
    steps = max(1, round(wanted / (given.batch_size * data.seq_len)))
    run = RunDirectory(folder / "model")
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
