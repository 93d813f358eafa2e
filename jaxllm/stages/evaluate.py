"""The `evaluate` stage: a run's model measured on text, by the objective it was trained with."""

import dataclasses
import tempfile
from pathlib import Path

import jax

from jaxllm import config as configuration
from jaxllm.checkpoints.load import LoadedModel, load_model
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.batches import EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus, prepare_text
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator, predicted_tokens, text_scores
from jaxllm.models.transformer import check_length
from jaxllm.objectives.pretraining import ObjectiveConfig, make_objective, objective_config_of
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
    directory = None if workdir is None else RunDirectory(workdir)
    if directory is not None:
        directory.open(dataclasses.asdict(config))
    trained_on = configuration.from_dict(DataConfig, source.config()["data"], "data")
    data = dataclasses.replace(trained_on, seq_len=config.data.seq_len or trained_on.seq_len)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        loaded = load_model(config.init, mesh)
        check_length(loaded.model, data.seq_len, "config.data.seq_len")
        phases = Phases()
        if config.data.eval:
            given = dataclasses.asdict(config.data) | {"seq_len": data.seq_len}
            data = dataclasses.replace(data, **given)
            folder = workdir or Path(scratch)
            store, split = prepare_text(data, loaded.tokenizer, folder, phases)
        else:
            tokenizer = TokenizerConfig(path=str(source.tokenizer))
            corpus = prepare_corpus(data, tokenizer, source.path, phases, source.data())
            store, split = corpus.eval, corpus.split
        objective = objective_config_of(source)
        scores = _scores(config, loaded, objective, store, data) | reading_scores(split)
    if directory is not None:
        directory.begin(dataclasses.asdict(config))
        directory.write_summary(scores)
    print_summary(scores)


def _scores(
    config: EvaluateConfig,
    loaded: LoadedModel,
    objective: ObjectiveConfig,
    store: TokenStore,
    data: DataConfig,
) -> dict[str, float]:
    rows = packed_rows(store, data.packing, data.seq_len, data.document_mask)
    mesh = jax.sharding.get_mesh()
    batches = EvalBatches(rows, config.batch_size, batch_sharding(mesh))
    evaluate = LossEvaluator(make_objective(loaded.model, objective, loaded.tokenizer))
    loss, _ = evaluate(loaded.params, {}, batches)["loss"]
    scores = text_scores(loss, store) if objective.every_token else {"eval/loss": loss}
    return scores | {
        "eval/tokens": float(predicted_tokens(store)),
        "eval/bytes": float(store.num_bytes),
    }
