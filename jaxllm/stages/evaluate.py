"""The `evaluate` stage: a run's model measured on text, by the objective it was trained with."""

import dataclasses
import tempfile
from pathlib import Path

import jax

from jaxllm import config as configuration
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.batches import EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus, prepare_text
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator, predicted_tokens, text_scores
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.models.transformer import check_length
from jaxllm.objectives.pretraining import KINDS, make_objective
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.tables import print_summary
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.stages.data_scores import reading_scores
from jaxllm.tokenizers.config import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class EvaluateDataConfig:
    """The text to measure on; what is not here is as in the run's training."""

    eval: str = ""
    """Sources of text, separated by commas; empty: what the run held out."""
    seq_len: int = 0
    """Tokens in a row; 0: as the run was trained."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of a source's lines is bad."""
    parse_special_tokens: bool = True
    """Read each `<s>…</s>` span of a record as a document of its own."""
    store: str = ""
    """Folder for tokenised text; empty: inside the work directory, if there is one."""

    def __post_init__(self) -> None:
        if self.seq_len < 0:
            raise ValueError("seq_len: must not be negative")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """A trained model measured on text, by the objective of its training."""

    stage: str = "evaluate"
    """Always `evaluate`."""
    init: str = ""
    """Run directory whose model is measured."""
    data: EvaluateDataConfig = EvaluateDataConfig()
    batch_size: int = 32
    """Rows at once, over all devices."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")


def run(config: EvaluateConfig, workdir: Path | None) -> None:
    """Prints the scores; with a work directory, writes `config.json` and `summary.json` too."""
    if not config.init:
        raise UserError("config.init: give the run directory of a trained model.")
    source = RunDirectory(config.init)
    trained_on = configuration.from_dict(DataConfig, source.group("data"), "data")
    directory = None if workdir is None else RunDirectory(workdir)
    if directory is not None:
        directory.open(dataclasses.asdict(config), dataclasses.asdict(EvaluateConfig()))
    data = dataclasses.replace(trained_on, seq_len=config.data.seq_len or trained_on.seq_len)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        trained = load_trained(config.init, mesh)
        check_length(trained.loaded.model, data.seq_len, "config.data.seq_len")
        phases = Phases()
        if config.data.eval:
            given = dataclasses.asdict(config.data) | {"seq_len": data.seq_len}
            data = dataclasses.replace(data, **given)
            folder = workdir or Path(scratch)
            store, split = prepare_text(data, trained.loaded.tokenizer, folder, phases)
        else:
            tokenizer = TokenizerConfig(path=str(source.tokenizer))
            corpus = prepare_corpus(data, tokenizer, source.path, phases, source.data())
            store, split = corpus.eval, corpus.split
        scores = _scores(config, trained, store, data) | reading_scores(split)
    if directory is not None:
        directory.begin(dataclasses.asdict(config))
        directory.write_summary(scores)
    print_summary(scores)


def _scores(
    config: EvaluateConfig, trained: TrainedModel, store: TokenStore, data: DataConfig
) -> dict[str, float]:
    rows = packed_rows(store, data.packing, data.seq_len, data.document_mask)
    mesh = jax.sharding.get_mesh()
    batches = EvalBatches(rows, config.batch_size, batch_sharding(mesh))
    loaded, objective = trained
    evaluate = LossEvaluator(make_objective(loaded.model, objective, loaded.tokenizer))
    loss, tokens = evaluate(loaded.params, {}, batches)["loss"]
    scores = {"eval/loss": loss, "eval/tokens": tokens, "eval/bytes": float(store.num_bytes)}
    if KINDS[objective.kind].every_token:
        scores |= text_scores(loss, store) | {"eval/tokens": float(predicted_tokens(store))}
    return scores
