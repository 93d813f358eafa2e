"""The `prepare` stage: text read, cleaned, split and tokenised, for later runs to share."""

import dataclasses
import time
from pathlib import Path

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus
from jaxllm.data.packing import packed_rows
from jaxllm.data.training_rows import training_rows
from jaxllm.errors import UserError
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.report import write_report
from jaxllm.reporting.tables import print_summary
from jaxllm.stages.data_scores import data_scores, phase_scores, source_scores
from jaxllm.tokenizers.config import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Text made ready for training: cleaned, split and tokenised, its rows planned."""

    stage: str = "prepare"
    """Always `prepare`."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


def run(config: PrepareConfig, workdir: Path | None) -> None:
    """Makes tokenizer, token stores and plans, or finds them made, and tells what they hold."""
    begin = time.monotonic()
    if workdir is None:
        raise UserError("--workdir is missing: give the directory to keep the tokens in.")
    directory = RunDirectory(workdir)
    directory.open(dataclasses.asdict(config), dataclasses.asdict(PrepareConfig()))
    phases = Phases()
    corpus = prepare_corpus(config.data, config.tokenizer, workdir, phases, directory.data())
    data = config.data
    rows = training_rows(data, corpus, seed=0, count=0)
    if config.tokenizer.path:
        corpus.tokenizer.save(directory.tokenizer)
    directory.begin(dataclasses.asdict(config), corpus.fingerprints)
    packed_rows(corpus.eval, data.packing, data.seq_len, data.document_mask)
    scores = data_scores(corpus) | source_scores(rows) | phase_scores(phases)
    scores["time/total"] = time.monotonic() - begin
    directory.write_summary(scores)
    report = write_report(workdir)
    print_summary(scores)
    print(f"report: {report}")
